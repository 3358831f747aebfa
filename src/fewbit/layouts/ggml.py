# SPDX-License-Identifier: Apache-2.0
"""What ggml's block layouts share: a row is a run of structs, each with the scales and codes of one span of columns.

``packed`` is uint8 (rows, spans * bytes per struct), the very bytes of a GGUF tensor; no parameter lies beside it. The
structs themselves are drawn in the file of each type. Numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.layout import Shape
from fewbit.errors import InputError
from fewbit.formats.spelling import parse
from fewbit.layouts.arrays import as_bytes, expect, of_bytes


def only(spelling: str, span: int) -> Callable[[Format, Shape], str | None]:
    """The refusal of a struct that holds one format, ``span`` columns at a time."""

    def refuse(format: Format, shape: Shape) -> str | None:
        if format != parse(spelling):
            return f"holds {spelling} only; asked for {format.name}"
        if shape[1] % span:
            return f"needs rows of a multiple of {span} columns; there are {shape[1]}"
        return None

    return refuse


def half_bytes(values: Tensor) -> Tensor:
    """float16 (rows, spans, 1) -> uint8 (rows, spans, 2)."""
    return as_bytes(values)


def as_half(data: Tensor) -> Tensor:
    """Inverse of :func:`half_bytes`."""
    return of_bytes(data, torch.float16)


def join(*fields: Tensor) -> Tensor:
    """Fields of a struct, uint8 (rows, spans, bytes) each, in file order -> uint8 (rows, spans * bytes)."""
    return torch.cat(fields, -1).reshape(fields[0].shape[0], -1)


def cut(packed: Tensor, shape: Shape, span: int, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Inverse of :func:`join`: the fields of ``sizes`` bytes of every struct.

    Raises:
        InputError: ``packed`` is not as long as ``shape`` demands.
    """
    rows, spans = shape[0], shape[1] // span
    expect("ggml blocks", packed, (rows, spans * sum(sizes)))
    return torch.split(packed.reshape(rows, spans, sum(sizes)), list(sizes), -1)


def halves(codes: Tensor) -> Tensor:
    """4-bit codes (..., 2 n) -> bytes (..., n): code j in the low nibble of byte j, code j + n in the high one."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def unhalve(data: Tensor) -> Tensor:
    """Inverse of :func:`halves`."""
    return torch.cat([data & 15, data >> 4], -1)


def quarters(codes: Tensor) -> Tensor:
    """2-bit codes (..., 4 n) -> bytes (..., n): code j + k n in bits 2k, 2k + 1 of byte j."""
    first, second, third, fourth = codes.chunk(4, -1)
    return first | second << 2 | third << 4 | fourth << 6


def unquarter(data: Tensor) -> Tensor:
    """Inverse of :func:`quarters`."""
    return torch.cat([(data >> shift) & 3 for shift in (0, 2, 4, 6)], -1)


def check_levels(format: Format, codes: Tensor) -> Tensor:
    """``codes``, refused when one of them stands for nothing.

    Raises:
        InputError: with the code.
    """
    if codes.numel() and int(codes.max()) >= format.levels:
        raise InputError(f"codes below {format.levels} for {format.name}", f"found {int(codes.max())}")
    return codes
