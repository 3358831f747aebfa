# SPDX-License-Identifier: Apache-2.0
"""The layout of the native kernels of tables of rows: each row by itself, neighbouring columns in neighbouring lanes.

A row's columns lie in chunks of 128 / bits, or 384 / bits where that is 3 or 6. A chunk is 16 lanes of one byte, or of
three; column k of the chunk lies in lane ``k % 16``, at its bits ``k // 16 * bits``. Four chunks lie together: bytes
with bits 0 to 7 of all their lanes, then those with 8 to 15, then 16 to 23; the last one to three of a row likewise. So
one load of 16 bytes, or of 64, and a shift yield 16 neighbouring columns of one chunk, or of four, whose table fills a
register. The last chunk is padded with code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.kernels import pages
from fewbit.layouts.arrays import expect_bytes
from fewbit.layouts.dense import load_params, store_params

LANES = 16
TOGETHER = 4
"""Chunks."""
BITS = (1, 2, 3, 4, 6, 8)
"""Of a code, that fill the bytes of a lane."""


def lane_bytes(bits: int) -> int:
    return 1 if bits % 3 else 3


def chunk(bits: int) -> int:
    """Columns of a chunk."""
    return LANES * 8 * lane_bytes(bits) // bits


def size(shape: Shape, bits: int) -> Shape:
    """(rows, bytes of a row)."""
    return shape[0], -(-shape[1] // chunk(bits)) * LANES * lane_bytes(bits)


def _refuse(format: Format, shape: Shape) -> str | None:
    if format.dim * format.height != 1:
        return f"holds one code a weight; a code of {format.name} stands for {format.dim * format.height}"
    if format.bits not in BITS:
        return f"holds codes of {', '.join(map(str, BITS))} bits; {format.name} has {format.bits}"
    return None


def _together(chunks: Tensor) -> Tensor:
    """(rows, chunks, parts, 16) as it lies in memory, each row flat; parts are the bytes of a lane."""
    whole = chunks.shape[1] // TOGETHER * TOGETHER
    fours = chunks[:, :whole].unflatten(1, (-1, TOGETHER)).transpose(2, 3)
    return torch.cat((fours.flatten(1), chunks[:, whole:].transpose(1, 2).flatten(1)), 1)


def _apart(packed: Tensor, parts: int) -> Tensor:
    """The inverse."""
    rows, chunks = packed.shape[0], packed.shape[1] // (parts * LANES)
    whole, rest = divmod(chunks, TOGETHER)
    fours, last = packed.split([whole * TOGETHER * parts * LANES, rest * parts * LANES], 1)
    fours = fours.reshape(rows, whole, parts, TOGETHER, LANES).transpose(2, 3).flatten(1, 2)
    return torch.cat((fours, last.reshape(rows, parts, rest, LANES).transpose(1, 2)), 1)


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    bits = format.bits
    columns = chunk(bits)
    packed = pages.empty(size(shape, bits))
    shifts = torch.arange(0, 8 * lane_bytes(bits), bits, dtype=torch.int32)[:, None]
    for first in range(0, shape[0], 256):
        few = torch.nn.functional.pad(codes[first : first + 256], (0, -shape[1] % columns))
        lanes = (few.reshape(len(few), -1, columns // LANES, LANES).int() << shifts).sum(2, dtype=torch.int32)
        bytes = lanes[:, :, None] >> torch.arange(0, 8 * lane_bytes(bits), 8, dtype=torch.int32)[:, None]
        packed[first : first + 256] = _together((bytes & 255).to(torch.uint8))
    return packed, store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    bits, unit = format.bits, lane_bytes(format.bits)
    packed = expect_bytes("row16 codes", packed, size(shape, bits))
    lanes = _apart(packed, unit).int() << torch.arange(0, 8 * unit, 8, dtype=torch.int32)[:, None]
    shifts = torch.arange(0, 8 * unit, bits, dtype=torch.int32)[:, None]
    codes = (lanes.sum(2, dtype=torch.int32)[:, :, None] >> shifts) & (2**bits - 1)
    codes = codes.reshape(shape[0], -1)[:, : shape[1]].to(torch.uint8)
    return codes.contiguous(), load_params(format, shape, stored)


ROW16 = Layout("row16", _refuse, _pack, _unpack)
