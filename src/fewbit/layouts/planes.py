# SPDX-License-Identifier: Apache-2.0
"""Bit planes: bit p of every code together, for kernels that look up groups of one-bit weights.

::

    packed (bits, rows, ceil(columns / 8)) uint8
    plane p, row r, byte k:   bit i is bit p of code 8k + i (0 beyond the last column)

Plane 0 holds the least significant bits. Polarity is that of the code: for signs a 1 is ``+scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params, code_dtype, code_shape
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.arrays import expect
from fewbit.layouts.dense import MOST, load_params, pack_rows, row_bytes, store_params, unpack_rows


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if format.bits <= MOST else f"packs codes of at most {MOST} bits; {format.name} has {format.bits}"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    planes = [pack_rows((codes >> bit) & 1, 1) for bit in range(format.bits)]
    return torch.stack(planes), store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = code_shape(format, shape)
    expect("bit planes", packed, (format.bits, rows, row_bytes(columns, 1)))
    codes = torch.zeros(rows, columns, dtype=code_dtype(format))
    for bit in range(format.bits):
        codes |= unpack_rows(packed[bit], 1, columns).to(codes.dtype) << bit
    return codes, load_params(format, shape, stored)


PLANES = Layout("planes", _refuse, _pack, _unpack)
