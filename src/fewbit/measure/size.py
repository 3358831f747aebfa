# SPDX-License-Identifier: Apache-2.0
"""Bytes on disk and true bits per weight of a model: from its files, or from its parameters when it has none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.containers import manifest as M
from fewbit.containers.files import named_files, size_of
from fewbit.containers.gguf import open_gguf
from fewbit.containers.safetensors import open_safetensors
from fewbit.errors import InputError


@dataclass(frozen=True)
class Size:
    """``bits_per_weight`` counts matrices only (what quantizing changes), scales included; ``counted`` says how."""

    size_bytes: int
    bits_per_weight: float
    counted: str


def weight_files(path: Path) -> list[Path]:
    """The files that hold weights: the GGUF file itself, or the safetensors (else PyTorch) files of a folder.

    A folder that holds both kinds loads its safetensors, so only those count.

    Raises:
        InputError: none is there, or the index names one that is absent. CorruptFileError: it names one elsewhere.
    """
    if path.is_file():
        return [path]
    files = named_files(path) or sorted(path.glob("pytorch_model*.bin"))
    if not files:
        raise InputError(f"weights of {path}", "the folder holds no safetensors or GGUF file")
    return files


def of_path(path: Path, parameters: int) -> Size:
    """Size of a folder or GGUF file; ``parameters`` of the model serve where the file cannot be read without pickle."""
    files = weight_files(path)
    total = sum(size_of(file) for file in files)
    if path.is_dir() and (path / M.NAME).is_file():
        bits = float(M.read(path)["bits_per_weight"])
        return Size(total, bits, "stored bytes of the quantized matrices, scales included, over their weights")
    if path.is_file():
        blocks = [(block.nbytes, block.shape) for block in open_gguf(path).tensors.values()]
        return Size(total, _bits(blocks), "stored bytes of the GGUF's matrices, scales included, over their weights")
    if files[0].suffix == ".safetensors":
        held = [entry for file in files for entry in open_safetensors(file).entries.values()]
        if any(are_words(entry.dtype, entry.shape) for entry in held):
            return Size(total, math.nan, "unknown: its matrices are words of an own layout, of so many weights each")
        entries = [(entry.nbytes, entry.shape) for entry in held]
        return Size(total, _bits(entries), "stored bytes of the matrices over their weights")
    return Size(total, 8 * total / parameters, "file size over parameters (PyTorch files are not opened)")


def are_words(dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether a matrix of a safetensors file holds packed weights (GPTQ, AWQ, bitsandbytes), not one an element."""
    return len(shape) >= 2 and not dtype.is_floating_point and dtype != torch.int8


def _bits(tensors: Iterable[tuple[int, Sequence[int]]]) -> float:
    """Bits per weight over the matrices among (bytes, shape)."""
    stored = weights = 0
    for nbytes, shape in tensors:
        if len(shape) >= 2:
            stored, weights = stored + nbytes, weights + math.prod(shape)
    return 8 * stored / weights if weights else math.nan


def of_model(model: Any) -> Size:
    """Size of a model in memory: bytes of its state, shared tensors once.

    Bits per weight are NaN when a matrix is stored in integers: only its folder says how many weights those stand for.
    """
    state = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    total = sum(t.nbytes for t in state)
    matrices = [t for t in state if t.dim() >= 2]
    weights = sum(t.numel() for t in matrices)
    if not weights or not all(t.is_floating_point() for t in matrices):
        return Size(
            total, math.nan, "unknown: the model is in memory and holds packed weights; give its folder instead"
        )
    stored = sum(t.nbytes for t in matrices)
    return Size(total, 8 * stored / weights, "dtype of the parameters; the model is in memory, not on disk")
