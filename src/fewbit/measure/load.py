# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers by path, through transformers (imported here only when something is loaded)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewbit import formats
from fewbit.containers import manifest as M
from fewbit.core import given
from fewbit.errors import InputError, UnsupportedError
from fewbit.model.tokenizer import of_transformers


def find(model: str | Path) -> Path:
    """The local folder or GGUF file of ``model``; a hub id (``owner/name``) is downloaded, the only network use.

    Raises:
        InputError: there is no such folder, and it is not a hub id.
    """
    from fewbit.model.checkpoint import HUB_ID, download

    path = given.place("the model", model)
    if path.exists():
        return path
    if isinstance(model, str) and HUB_ID.fullmatch(model) and not Path(model.split("/")[0]).exists():
        return download(model)
    raise InputError(f"model {model}", "there is no such folder or file", "give a folder, a .gguf file or a hub id")


def load_model(path: Path, dtype: torch.dtype, activation: str | None = None) -> Any:
    """The causal language model at ``path`` in eval mode, floats in ``dtype``; a fewbit folder comes with its kernels,
    which round inputs to ``activation`` where the folder itself leaves them float (see :func:`fewbit.load`).

    A folder goes through transformers; a GGUF file through :mod:`fewbit.model`, which checks it first.

    Raises:
        InputError: it cannot be loaded; the reason is in the message. CorruptFileError: a damaged or hostile GGUF file.
        UnsupportedError: a fewbit folder, and the plug-in that ``import fewbit`` brings is not active.
    """
    from transformers.quantizers import auto

    from fewbit.model.classes import from_folder

    if path.is_file():
        return _load_file(path, dtype)
    if (path / M.NAME).is_file() and "fewbit" not in auto.AUTO_QUANTIZER_MAPPING:
        raise UnsupportedError(f"load {path}", "fewbit's transformers plug-in is not active", "import fewbit first")
    model = from_folder(path, dtype=dtype)
    if activation is not None:
        from fewbit.model.layers import round_inputs

        round_inputs(model, formats.parse(activation))
    return model


def _load_file(path: Path, dtype: torch.dtype) -> Any:
    from fewbit.model.checkpoint import open_checkpoint
    from fewbit.model.loading import Loader
    from fewbit.model.skeleton import build

    checkpoint = open_checkpoint(path)
    model = build(checkpoint.config)
    Loader(checkpoint, model).load("", dtype)
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside the weights, or inside the GGUF file.

    Raises:
        InputError: there is none, or it cannot be read. CorruptFileError: a file is damaged.
    """
    if path.is_file():
        from fewbit.model.checkpoint import open_checkpoint

        return open_checkpoint(path).tokenizer()
    return of_transformers(path)
