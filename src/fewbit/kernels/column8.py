# SPDX-License-Identifier: Apache-2.0
"""The layout of the native kernels of vectors: codes in tiles of eight rows, column by column.

The eight codes of a tile and a column lie together: their indices into the codebook as a dense string of 8
``index_bits`` bits, which are ``index_bits`` bytes (:mod:`fewbit.layouts.dense` draws it), then those into the residual
book in ``residual_bits`` bytes. Columns follow one another, then the next tile: (tiles, columns * bits of a code)
bytes, tight but for rows of codes that are no multiple of eight, padded with code 0. While a kernel walks the columns
of a tile, its eight vectors of outputs stay in registers. Every index is below the entries of its book, whatever the
bytes are. Indices of fewer than 4 bits take 4 here, and their books are read as 16 entries (:func:`lowered`): files
hold what they need.

Two indices of few bits are one, the whole code, into a book of all sums of an entry of either (:func:`joint`): a kernel
then loads one entry and adds none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.blocks import width
from fewbit.core.format import Format, Params, Vectors, code_dtype, code_shape
from fewbit.core.layout import Layout, Shape
from fewbit.formats.vector import Vector
from fewbit.layouts.arrays import expect_bytes
from fewbit.layouts.dense import load_params, pack_rows, store_params, unpack_rows

TILE = 8
"""Codes that lie together."""
LEAST = 4
"""Bits of an index in memory: kernels read no fewer."""
JOINT_BITS = 12
"""Bits of two indices, at most, that are one: sums that the second-level cache holds."""
JOINT_CODES = 128
"""Codes for each sum of a block, at least: its book then takes a sixth of their memory, of vectors of 16 a third."""


def tiles(format: Format, shape: Shape) -> int:
    """Tiles of a (rows, columns) matrix."""
    return -(-code_shape(format, shape)[0] // TILE)


def checked(format: Format, shape: Shape, packed: Tensor) -> Tensor:
    """``packed``, contiguous.

    Raises:
        InputError: it is not the bytes of a (rows, columns) matrix: a kernel would read beyond them.
    """
    return expect_bytes("column8 codes", packed, (tiles(format, shape), shape[1] * sum(fields(format, shape))))


def joint(format: Format, shape: Shape) -> bool:
    """Whether the indices into both books of a (rows, columns) matrix are one."""
    assert isinstance(format, Vector)
    codes = code_shape(format, shape)[0] * min(width(shape[1], format.block), shape[1])
    return format.residual_bits > 0 and format.bits <= JOINT_BITS and codes >= JOINT_CODES << format.bits


def fields(format: Format, shape: Shape) -> list[int]:
    """Bits of the indices of a code in memory, by book."""
    assert isinstance(format, Vector)
    return [max(LEAST, bits) for bits in ([format.bits] if joint(format, shape) else format.fields.values())]


def lowered(physical: Vectors, joint: bool) -> Vectors:
    """``physical`` with indices of at least ``LEAST`` bits, and zeros in books for those that no code holds; with one
    book of all sums where indices are ``joint``."""
    books, own = physical.books, physical.bits
    if joint:
        first, second = books
        books, own = ((first[:, None] + second[:, :, None]).flatten(1, 2),), (sum(own),)
    bits = tuple(max(LEAST, n) for n in own)
    padded = (torch.nn.functional.pad(b, (0, 0, 0, (1 << n) - b.shape[1])) for b, n in zip(books, bits, strict=True))
    return Vectors(tuple(padded), bits)


def split(format: Format, codes: Tensor) -> list[Tensor]:
    """The indices of ``codes``, by book."""
    assert isinstance(format, Vector)
    found = []
    for bits in format.fields.values():
        found.append(codes & ((1 << bits) - 1))
        codes = codes >> bits
    return found


def joined(format: Format, indices: list[Tensor]) -> Tensor:
    """Codes of indices by book: the inverse of :func:`split`."""
    assert isinstance(format, Vector)
    codes, base = torch.zeros_like(indices[0], dtype=code_dtype(format)), 0
    for index, bits in zip(indices, format.fields.values(), strict=True):
        codes |= index.to(codes.dtype) << base
        base += bits
    return codes


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if isinstance(format, Vector) else f"holds vectors down columns; {format.name} is something else"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    columns, widths = codes.shape[1], fields(format, shape)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % TILE))
    eights = padded.reshape(-1, TILE, columns).transpose(1, 2).reshape(-1, TILE)
    parts = [
        pack_rows(index.to(torch.uint8) if bits <= 8 else index, bits)
        for index, bits in zip([eights] if joint(format, shape) else split(format, eights), widths, strict=True)
    ]
    return torch.cat(parts, 1).reshape(-1, columns * sum(widths)), store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = code_shape(format, shape)
    packed, widths = checked(format, shape, packed), fields(format, shape)
    strings = packed.reshape(-1, sum(widths)).split(widths, 1)
    indices = [unpack_rows(s.contiguous(), b, TILE) for s, b in zip(strings, widths, strict=True)]
    eights = indices[0].to(code_dtype(format)) if joint(format, shape) else joined(format, indices)
    codes = eights.reshape(-1, columns, TILE).transpose(1, 2).reshape(-1, columns)
    return codes[:rows].contiguous(), load_params(format, shape, stored)


COLUMN8 = Layout("column8", _refuse, _pack, _unpack)
