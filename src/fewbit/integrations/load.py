# SPDX-License-Identifier: Apache-2.0
"""``fewbit.load``: a quantized folder as a transformers model, its files checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit import formats
from fewbit.containers import manifest as M
from fewbit.core import given
from fewbit.errors import InputError


def load(path: str | Path, *, check: bool = True, activation: str | None = None, **kwargs: Any) -> Any:
    """The model in ``path`` in eval mode, layers prepared for the fastest kernels of this machine.

    Args:
        check: compare every weight file with the hash in the manifest first.
        activation: round the inputs of linear layers to this format, e.g. ``"int8/g64"``, and multiply integers where
            a kernel can; or ``"sign/channel"``, and count signs where weights are ``sign/channel`` too. Faster, at a
            cost in accuracy that :func:`fewbit.evaluate` shows. Layers that were quantized together with their inputs
            (W8A8) keep their own. None: inputs stay float.
        kwargs: go to ``from_pretrained``.

    Raises:
        InputError: no fewbit folder. CorruptFileError: a file is missing or its bytes changed.
        SpecError: ``activation`` spells no format, or ``path`` is none.
    """
    from fewbit.model.classes import from_folder
    from fewbit.model.layers import round_inputs

    folder = given.place("the model", path)
    manifest = M.read(folder)
    if manifest.get("kind") == M.NETWORK:
        found = "it holds a network whose class is not transformers' to know"
        raise InputError(f"{folder} as a language model", found, "fewbit.network.load(folder, Architecture()) reads it")
    if check:
        M.check_files(folder, manifest)
    rounding = None if activation is None else formats.parse(activation)
    model = from_folder(folder, **kwargs)
    if rounding is not None:
        round_inputs(model, rounding)
    return model
