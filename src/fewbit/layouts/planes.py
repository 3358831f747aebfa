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

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.arrays import expect
from fewbit.layouts.dense import load_params, pack_rows, row_bytes, store_params, unpack_rows


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if format.bits <= 8 else f"packs codes of at most 8 bits; {format.name} has {format.bits}"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    planes = [pack_rows((codes >> bit) & 1, 1) for bit in range(format.bits)]
    return torch.stack(planes), store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    columns = shape[1] // format.dim
    expect("bit planes", packed, (format.bits, shape[0], row_bytes(columns, 1)))
    codes = unpack_rows(packed[0], 1, columns)
    for bit in range(1, format.bits):
        codes = codes | unpack_rows(packed[bit], 1, columns) << bit
    return codes, load_params(format, shape, stored)


PLANES = Layout("planes", _refuse, _pack, _unpack)
