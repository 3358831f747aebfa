# SPDX-License-Identifier: Apache-2.0
"""The layout of the native kernels of vectors of bytes: codes as a matrix of their own, in tiles of 16 and chunks of
32 columns.

A code stands for ``length`` rows of a column, so there are ceil(rows / length) codes a column. A chunk holds the
indices of its 16 x 32 codes into the codebook, as :mod:`fewbit.kernels.tile16` draws a chunk of ``index_bits``, then
those into the residual book, as one of ``residual_bits``. Chunks of a tile follow one another, then the next tile:
(tiles, chunks * bits of a code * 64) bytes, ragged edges padded with code 0; indices of fewer than 4 bits take 4, as in
:mod:`fewbit.kernels.column8`. Sixty-four indices into one book then come out as bytes by shifts and masks, 16 codes of
four neighbouring columns.

Indices of 6 bits lie otherwise, as a lookup among 64 entries heeds no more than 6 bits of a byte: vector g of their six
holds columns 4g to 4g + 3 in the low 6 bits of bytes. The two bits above, of vectors 0, 1, 2 and of 3, 4, 5, are bits 0
and 1, 2 and 3, 4 and 5 of columns 24 to 27 and of 28 to 31.

Where some index has more than 8 bits, books are too large to look up in registers: entries are loaded one by one, and
each of the 16 codes of a tile lies by itself, (16, chunks, bits of a code * 4) bytes in as much memory. A chunk is then
its 32 indices into the codebook as a dense string (:mod:`fewbit.layouts.dense` draws it), then those into the residual
book; indices of fewer than 8 bits take 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params, code_shape
from fewbit.core.layout import Layout, Shape
from fewbit.formats.vector import Vector
from fewbit.kernels import pages
from fewbit.kernels.column8 import LEAST, joined, split
from fewbit.kernels.tile16 import COLUMNS, ROWS, pack_codes, size, unpack_rows
from fewbit.layouts import dense
from fewbit.layouts.arrays import expect_bytes
from fewbit.layouts.dense import load_params, store_params

LOOKED_UP = 8
"""Bits of an index, at most, where entries are looked up in registers."""


def wide(format: Format) -> bool:
    """Whether entries are loaded one by one."""
    assert isinstance(format, Vector)
    return max(format.fields.values()) > LOOKED_UP


def fields(format: Format) -> list[int]:
    """Bits of the indices of a code in memory, by book."""
    assert isinstance(format, Vector)
    return [max(LOOKED_UP if wide(format) else LEAST, bits) for bits in format.fields.values()]


def checked(format: Format, shape: Shape, packed: Tensor) -> Tensor:
    """``packed``, contiguous.

    Raises:
        InputError: it is not the bytes of a (rows, columns) matrix: a kernel would read beyond them.
    """
    return expect_bytes("vector16 codes", packed, size(code_shape(format, shape), sum(fields(format))))


def pack_six(indices: Tensor) -> Tensor:
    """uint8 indices (codes, columns) of 6 bits -> uint8 (tiles, bytes a tile)."""
    rows, columns = indices.shape
    padded = torch.nn.functional.pad(indices, (0, -columns % COLUMNS, 0, -rows % ROWS))
    groups = padded.reshape(-1, ROWS, padded.shape[1] // COLUMNS, 8, 4).permute(0, 2, 3, 1, 4)
    rest = [groups[:, :, group] >> low << 6 for group in (6, 7) for low in (0, 2, 4)]
    return (groups[:, :, :6] | torch.stack(rest, 2)).reshape(len(padded) // ROWS, -1)


def unpack_six(packed: Tensor, shape: Shape) -> Tensor:
    """The inverse of :func:`pack_six`: uint8 (codes, columns)."""
    vectors = packed.reshape(len(packed), -1, 6, ROWS, 4)
    first, second, third = (vectors >> 6).reshape(len(packed), -1, 2, 3, ROWS, 4).unbind(3)
    groups = torch.cat([vectors & 63, first | second << 2 | third << 4], 2)
    return groups.permute(0, 3, 1, 2, 4).reshape(len(packed) * ROWS, -1)[: shape[0], : shape[1]].contiguous()


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if isinstance(format, Vector) else f"holds vectors down columns; {format.name} is something else"


def pack_wide(indices: Tensor, bits: int) -> Tensor:
    """Indices (codes, columns) of ``bits`` bits -> uint8 (whole tiles of codes, chunks, 4 bits)."""
    rows, columns = indices.shape
    padded = torch.nn.functional.pad(indices, (0, -columns % COLUMNS, 0, -rows % ROWS))
    return dense.pack_rows(padded, bits).reshape(len(padded), -1, 4 * bits)


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    packed = pages.empty(size(code_shape(format, shape), sum(fields(format))))
    if wide(format):
        parts = [pack_wide(index, bits) for index, bits in zip(split(format, codes), fields(format), strict=True)]
        torch.cat(parts, 2, out=packed.view(parts[0].shape[0], parts[0].shape[1], -1))
        return packed, store_params(format, params)
    chunks, base = packed.reshape(len(packed), -1, sum(fields(format)) * 64), 0
    for index, bits in zip(split(format, codes), fields(format), strict=True):
        index = index.to(torch.uint8)
        field = pack_six(index) if bits == 6 else pack_codes(index, bits)
        chunks[:, :, base * 64 : (base + bits) * 64] = field.reshape(len(packed), -1, bits * 64)
        base += bits
    return packed, store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = code_shape(format, shape)
    packed = checked(format, shape, packed)
    if wide(format):
        strings = packed.reshape(len(packed) * ROWS, -1, sum(fields(format)) * 4)[:rows]
        parts = zip(strings.split([4 * bits for bits in fields(format)], 2), fields(format), strict=True)
        whole = strings.shape[1] * COLUMNS
        found = [dense.unpack_rows(part.reshape(rows, -1), bits, whole)[:, :columns] for part, bits in parts]
        return joined(format, found).contiguous(), load_params(format, shape, stored)
    chunks = packed.reshape(len(packed), -1, sum(fields(format)) * 64)
    indices, base, every = [], 0, torch.arange(rows)
    for bits in fields(format):
        field = chunks[:, :, base * 64 : (base + bits) * 64].reshape(len(packed), -1)
        six = bits == 6
        indices.append(unpack_six(field, (rows, columns)) if six else unpack_rows(field, (rows, columns), bits, every))
        base += bits
    return joined(format, indices), load_params(format, shape, stored)


VECTOR16 = Layout("vector16", _refuse, _pack, _unpack)
