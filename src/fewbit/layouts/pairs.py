# SPDX-License-Identifier: Apache-2.0
"""Nibble pairs: every code of at most 4 bits takes a nibble, two neighbours a byte.

::

    byte j of a row:   bits 0-3  code 2j        bits 4-7  code 2j + 1 (0 beyond the last column)

With 4 bits these are the bytes of :mod:`fewbit.layouts.dense`; with 2 or 3 bits a nibble has bits to spare and any code
is one shift away. ``ceil(columns / 2)`` bytes a row.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.format import Format, Params, code_shape
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.arrays import expect
from fewbit.layouts.dense import load_params, pack_rows, row_bytes, store_params, unpack_rows


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if format.bits <= 4 else f"packs codes of at most 4 bits; {format.name} has {format.bits}"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return pack_rows(codes, 4), store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = code_shape(format, shape)
    expect("nibbles", packed, (rows, row_bytes(columns, 4)))
    return unpack_rows(packed, 4, columns), load_params(format, shape, stored)


PAIRS = Layout("pairs", _refuse, _pack, _unpack)
