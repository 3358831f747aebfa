# SPDX-License-Identifier: Apache-2.0
"""The layout of the native kernels of tables of rows: each row by itself, neighbouring columns in neighbouring lanes.

A row's columns lie in chunks of 128 / bits, or 384 / bits where that is 3 or 6. A chunk is 16 lanes of one byte, or of
three (bits 0 to 7 of all lanes, then 8 to 15, then 16 to 23); column k of the chunk lies in lane ``k % 16``, at its
bits ``k // 16 * bits``. So one load and a shift yield 16 neighbouring columns of a row, whose table fills a register.
The last chunk is padded with code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.kernels import pages
from fewbit.layouts.arrays import expect
from fewbit.layouts.dense import load_params, store_params

LANES = 16
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


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    bits = format.bits
    columns = chunk(bits)
    packed = pages.empty(size(shape, bits))
    shifts = torch.arange(0, 8 * lane_bytes(bits), bits, dtype=torch.int32)[:, None]
    for first in range(0, shape[0], 256):
        few = torch.nn.functional.pad(codes[first : first + 256], (0, -shape[1] % columns))
        lanes = (few.reshape(len(few), -1, columns // LANES, LANES).int() << shifts).sum(2, dtype=torch.int32)
        bytes = lanes[:, :, None] >> torch.arange(0, 8 * lane_bytes(bits), 8, dtype=torch.int32)[:, None]
        packed[first : first + 256] = (bytes & 255).to(torch.uint8).reshape(len(few), -1)
    return packed, store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    bits, unit = format.bits, lane_bytes(format.bits)
    expect("row16 codes", packed, size(shape, bits))
    lanes = packed.reshape(shape[0], -1, unit, LANES).int() << torch.arange(0, 8 * unit, 8, dtype=torch.int32)[:, None]
    shifts = torch.arange(0, 8 * unit, bits, dtype=torch.int32)[:, None]
    codes = (lanes.sum(2, dtype=torch.int32)[:, :, None] >> shifts) & (2**bits - 1)
    codes = codes.reshape(shape[0], -1)[:, : shape[1]].to(torch.uint8)
    return codes.contiguous(), load_params(format, shape, stored)


ROW16 = Layout("row16", _refuse, _pack, _unpack)
