# SPDX-License-Identifier: Apache-2.0
"""What the int32 layouts of other tools share: a dense bit stream cut into little-endian 32-bit words.

::

    n = 3:  word 0 holds codes 0-9 in bits 0-29 and the low two bits of code 10; word 1 begins with its high bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Shape
from fewbit.errors import InputError
from fewbit.formats.affine import Affine
from fewbit.layouts.arrays import as_bytes, expect, of_bytes
from fewbit.layouts.dense import pack_rows, row_bytes, unpack_rows


def row_words(columns: int, bits: int) -> int:
    """Words that ``columns`` codes of ``bits`` bits take."""
    return -(-columns * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) -> int32 (rows, ceil(n * bits / 32))."""
    packed = pack_rows(codes, bits)
    return of_bytes(torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)), torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_words`: uint8 (rows, columns)."""
    expect("packed words", words, (words.shape[0], row_words(columns, bits)))
    return unpack_rows(as_bytes(words)[:, : row_bytes(columns, bits)], bits, columns)


def refuse_affine(format: Format, widths: tuple[int, ...]) -> str | None:
    """The reason why ``format`` is not an integer format of one of ``widths`` bits with an integer zero."""
    if not isinstance(format, Affine):
        return f"holds integers under one scale a group; {format.name} is something else"
    if format.whole:
        return f"holds a scale for each row or group; {format.name} has one for all rows"
    if format.bits not in widths:
        return f"holds codes of {', '.join(map(str, widths))} bits; {format.name} has {format.bits}"
    if format.middle != int(format.middle) and format.symmetric:
        return f"needs an integer zero point; that of {format.name} is {format.middle}"
    return None


def zeros(format: Format, shape: Shape, params: Params) -> Tensor:
    """Zero points (rows, groups) uint8; the fixed middle of a symmetric format."""
    assert isinstance(format, Affine)
    if format.symmetric:
        return torch.full((shape[0], B.count(shape[1], format.block)), int(format.middle), dtype=torch.uint8)
    return params["zero_point"].squeeze(-1)


def params_of(format: Format, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """Logical parameters from scales and zero points, both (rows, groups).

    Raises:
        InputError: a scale that float16 cannot hold, or a zero point that a symmetric format does not have.
    """
    assert isinstance(format, Affine)
    half = scale.to(torch.float16)
    if not torch.equal(half.to(scale.dtype), scale):
        raise InputError(f"float16 scales for {format.name}", f"found {scale.dtype} scales that float16 cannot hold")
    params = {"scale": half.contiguous().unsqueeze(-1)}
    if not format.symmetric:
        return {**params, "zero_point": zero.contiguous().unsqueeze(-1)}
    if not bool((zero == int(format.middle)).all()):
        raise InputError(
            f"zero points of {int(format.middle)} for {format.name}",
            f"found others, from {int(zero.min())} to {int(zero.max())}",
            "the same format spelt asym",
        )
    return params
