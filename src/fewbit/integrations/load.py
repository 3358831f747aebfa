# SPDX-License-Identifier: Apache-2.0
"""``fewbit.load``: a quantized folder as a transformers model, its files checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.containers import manifest as M


def load(path: str | Path, *, check: bool = True, **kwargs: Any) -> Any:
    """The model in ``path`` in eval mode, layers prepared for the fastest kernels of this machine.

    Args:
        check: compare every weight file with the hash in the manifest first. ``kwargs`` go to ``from_pretrained``.

    Raises:
        InputError: no fewbit folder. CorruptFileError: a file is missing or its bytes changed.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    manifest = M.read(folder)
    if check:
        M.check_files(folder, manifest)
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **kwargs).eval()
