# SPDX-License-Identifier: Apache-2.0
"""Layouts in which AVX2 multiplies codes of 3 and of 1 bit by int8: tile16 and row16, arranged for its lookups.

In halves16, tiles, chunks and lanes are those of :mod:`fewbit.kernels.tile16`. Of column k of a chunk, with
g = k // 4 < 6, the code is bits ``g % 2 * 4`` to ``g % 2 * 4 + 2`` of byte ``k % 4`` of the lane in vector ``g // 2``.
Bits 3 and 7 of each byte are those of the last two groups of columns: vector v holds bit v of their codes. In
rowhalves16, chunks and lanes are those of :mod:`fewbit.kernels.row16`, and the three bytes of a lane are such vectors:
g = k // 16 stands in byte ``g // 2``. One mask and one shift then yield two codes for a lookup, which heeds no more
bits than it must.

In bytes16, of 1 bit, bytes j of all lanes of a vector of tile16 lie together, for j = 0 to 3, those of rows 0-3, 8-11,
4-7 and 12-15 in this order: a lookup takes the same four columns of 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.kernels import native, row16, tile16
from fewbit.kernels.row16 import ROW16
from fewbit.kernels.tile16 import ROWS, TILE16, unpack_rows
from fewbit.layouts.arrays import expect_bytes


def _tiles(bits: int) -> Callable[[Tensor, int, bool], Tensor]:
    def move(packed: Tensor, columns: int, back: bool) -> Tensor:
        """``packed`` (tiles, bytes a tile) itself, moved from tile16, or ``back`` to it."""
        packed = expect_bytes("arranged codes", packed, tile16.size((ROWS * len(packed), columns), bits))
        native.core().arrange(ROWS * packed.shape[0], columns, bits, int(back), packed.data_ptr())
        return packed

    return move


def _rows(packed: Tensor, columns: int, back: bool) -> Tensor:
    """``packed`` (rows, bytes a row) itself, moved from row16, or ``back`` to it."""
    packed = expect_bytes("arranged codes", packed, row16.size((len(packed), columns), 3))
    native.core().rowhalves16(packed.shape[0], columns, int(back), packed.data_ptr())
    return packed


def unpack_rows_of_arranged(packed: Tensor, shape: Shape, bits: int, rows: Tensor) -> Tensor:
    """uint8 codes (n, columns) of the given ``rows`` (n,) of halves16 or bytes16 only."""
    tiles, which = torch.unique(rows // ROWS, return_inverse=True)
    few = _tiles(bits)(packed[tiles], shape[1], True)
    return unpack_rows(few, (ROWS * len(tiles), shape[1]), bits, ROWS * which + rows % ROWS)


def _arranged(name: str, bits: int, base: Layout, move: Callable[[Tensor, int, bool], Tensor]) -> Layout:
    def refuse(format: Format, shape: Shape) -> str | None:
        if format.bits != bits:
            return f"holds codes of {bits} bits; {format.name} has {format.bits}"
        return native.why_not() or base.refuse(format, shape)

    def pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        packed, stored = base.pack(format, shape, codes, params)
        return move(packed, shape[1], False), stored

    def unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
        return base.unpack(format, shape, move(packed.clone(), shape[1], True), stored)

    return Layout(name, refuse, pack, unpack)


HALVES16 = _arranged("halves16", 3, TILE16, _tiles(3))
ROWHALVES16 = _arranged("rowhalves16", 3, ROW16, _rows)
BYTES16 = _arranged("bytes16", 1, TILE16, _tiles(1))
