# SPDX-License-Identifier: Apache-2.0
"""The layout of the native kernels: rows in tiles of 16, columns in chunks of 32.

A chunk of 16 rows x 32 columns of b-bit codes takes b vectors of 64 bytes; each 32-bit lane of a vector belongs to one
row. A code is split into parts of power-of-two width, lowest bits first and widest part first (3 = 2+1, 5 = 4+1,
6 = 4+2, 7 = 4+2+1); a part of width w takes w vectors of 8/w fields a byte. Column k of the chunk, with g = k // 4,
lies in vector ``g w // 8`` of the part, in byte ``k % 4`` of the lane, at its bits ``g w % 8``. Ragged edges are padded
with code 0: ``16 ceil(rows/16) * 32 ceil(columns/32)`` codes of b bits are stored. A shift and a mask yield 16 rows of
a column (for products of floats) or of four columns, one a byte (for products of bytes).

Packing and unpacking exist twice, here and in ``csrc/core/tile16.cc``; they are tested against one another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.kernels import native, pages
from fewbit.layouts.arrays import expect_bytes
from fewbit.layouts.dense import load_params, store_params

ROWS, COLUMNS = 16, 32


def parts(bits: int) -> list[tuple[int, int]]:
    """(width, lowest bit) of the parts of a ``bits``-bit code; the lowest bit is also the part's first vector."""
    found, base = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, base))
            base += width
    return found


def size(shape: Shape, bits: int) -> tuple[int, int]:
    """(tiles, bytes a tile) of a (rows, columns) matrix of ``bits``-bit codes."""
    return -(-shape[0] // ROWS), -(-shape[1] // COLUMNS) * bits * 64


def _shifts(part: int) -> Tensor:
    """Lowest bit within the lane of each field of a vector, (8 / part, 4): fields of a byte, bytes of the lane."""
    fields = torch.arange(0, 8, part, dtype=torch.int32, device="cpu")
    return fields[:, None] + torch.arange(0, 32, 8, dtype=torch.int32, device="cpu")


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, columns) -> uint8 (tiles, bytes a tile), with torch alone."""
    rows, columns = codes.shape
    tiles, width = size((rows, columns), bits)
    padded = torch.nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS))
    chunks = padded.reshape(tiles, ROWS, -1, COLUMNS).permute(0, 2, 1, 3).int()
    vectors = []
    for part, base in parts(bits):
        fields = ((chunks >> base) & (2**part - 1)).reshape(*chunks.shape[:3], part, 8 // part, 4)
        lanes = (fields << _shifts(part)).sum((-2, -1), dtype=torch.int32)
        vectors.append(lanes.permute(0, 1, 3, 2))
    return torch.cat(vectors, 2).contiguous().view(torch.uint8).reshape(tiles, width)


def _lanes(packed: Tensor, shape: Shape, bits: int) -> Tensor:
    """The int32 lanes (tiles, chunks, bits, 16) of ``packed``; no copy."""
    expected = size(shape, bits)
    packed = expect_bytes("tile16 codes", packed, expected)
    return packed.view(torch.int32).reshape(expected[0], -1, bits, ROWS)


def unpack_rows(packed: Tensor, shape: Shape, bits: int, rows: Tensor) -> Tensor:
    """uint8 codes (n, columns) of the given ``rows`` (n,) only."""
    lanes = _lanes(packed, shape, bits)[rows // ROWS, :, :, rows % ROWS]
    codes = lanes.new_zeros(lanes.shape[0], lanes.shape[1], COLUMNS)
    for part, base in parts(bits):
        fields = (lanes[:, :, base : base + part, None, None] >> _shifts(part)) & (2**part - 1)
        codes |= fields.reshape(codes.shape) << base
    return codes.to(torch.uint8).reshape(codes.shape[0], -1)[:, : shape[1]].contiguous()


def _refuse(format: Format, shape: Shape) -> str | None:
    if format.dim * format.height != 1:
        return f"holds one code a weight; a code of {format.name} stands for {format.dim * format.height}"
    return None if format.bits <= 8 else f"holds codes of at most 8 bits; {format.name} has {format.bits}"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    stored = store_params(format, params)
    if not native.available():
        return pack_codes(codes, format.bits), stored
    codes = codes.contiguous()
    packed = pages.empty(size(shape, format.bits))
    native.core().tile16_pack(codes.data_ptr(), shape[1], *shape, format.bits, packed.data_ptr())
    return packed, stored


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    params = load_params(format, shape, stored)
    if not native.available():
        return unpack_rows(packed, shape, format.bits, torch.arange(shape[0])), params
    lanes = _lanes(packed, shape, format.bits)
    codes = pages.fresh(*shape, dtype=torch.uint8)
    native.core().tile16_unpack(lanes.data_ptr(), *shape, format.bits, codes.data_ptr(), shape[1])
    return codes, params


TILE16 = Layout("tile16", _refuse, _pack, _unpack)
