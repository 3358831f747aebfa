# SPDX-License-Identifier: Apache-2.0
"""The layouts in which AVX2 multiplies codes of 3 bits by int8: tile16 and row16, two codes in the halves of a byte.

In halves16, tiles, chunks and lanes are those of :mod:`fewbit.kernels.tile16`. Of column k of a chunk, with
g = k // 4 < 6, the code is bits ``g % 2 * 4`` to ``g % 2 * 4 + 2`` of byte ``k % 4`` of the lane in vector ``g // 2``.
Bits 3 and 7 of each byte are those of the last two groups of columns: vector v holds bit v of their codes. In
rowhalves16, chunks and lanes are those of :mod:`fewbit.kernels.row16`, and the three bytes of a lane are such vectors:
g = k // 16 stands in byte ``g // 2``. One mask and one shift then yield two codes for a lookup, which heeds no more
bits than it must.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.kernels import native
from fewbit.kernels.row16 import ROW16
from fewbit.kernels.tile16 import ROWS, TILE16, unpack_rows

BITS = 3


def _tiles(packed: Tensor, columns: int, back: bool) -> Tensor:
    """``packed`` (tiles, bytes a tile) itself, moved from tile16, or ``back`` to it."""
    native.core().halves16(ROWS * packed.shape[0], columns, int(back), packed.data_ptr())
    return packed


def _rows(packed: Tensor, columns: int, back: bool) -> Tensor:
    """``packed`` (rows, bytes a row) itself, moved from row16, or ``back`` to it."""
    native.core().rowhalves16(packed.shape[0], columns, int(back), packed.data_ptr())
    return packed


def unpack_rows_of_halves(packed: Tensor, shape: Shape, rows: Tensor) -> Tensor:
    """uint8 codes (n, columns) of the given ``rows`` (n,) of halves16 only."""
    tiles, which = torch.unique(rows // ROWS, return_inverse=True)
    few = _tiles(packed[tiles], shape[1], True)
    return unpack_rows(few, (ROWS * len(tiles), shape[1]), BITS, ROWS * which + rows % ROWS)


def _halved(name: str, base: Layout, move: Callable[[Tensor, int, bool], Tensor]) -> Layout:
    def refuse(format: Format, shape: Shape) -> str | None:
        if format.bits != BITS:
            return f"holds codes of {BITS} bits; {format.name} has {format.bits}"
        return native.why_not() or base.refuse(format, shape)

    def pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
        packed, stored = base.pack(format, shape, codes, params)
        return move(packed, shape[1], False), stored

    def unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
        return base.unpack(format, shape, move(packed.clone(), shape[1], True), stored)

    return Layout(name, refuse, pack, unpack)


HALVES16 = _halved("halves16", TILE16, _tiles)
ROWHALVES16 = _halved("rowhalves16", ROW16, _rows)
