# SPDX-License-Identifier: Apache-2.0
"""ggml's TQ2_0: ``ternary/g256``, 66 bytes for 256 weights, 2.0625 bits a weight.

::

    byte   0-63  qs   32 bytes a half of 128 codes, byte j: code j + 32 k in bits 2k, 2k + 1
    byte  64-65  d    float16     w = d * (code - 1), code 0, 1 or 2; a field of 3 is refused
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.ggml import as_half, check_levels, cut, half_bytes, join, only, quarters, unquarter

_SPAN = 256


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, spans = shape[0], shape[1] // _SPAN
    fields = quarters(codes.reshape(rows, spans, 2, 128)).reshape(rows, spans, 64)
    return join(fields, half_bytes(params["scale"])), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    fields, scale = cut(packed, shape, _SPAN, (64, 2))
    codes = unquarter(fields.reshape(shape[0], -1, 2, 32)).reshape(shape)
    return check_levels(format, codes), {"scale": as_half(scale)}


TQ2_0 = Layout("tq2_0", only("ternary/g256", _SPAN), _pack, _unpack)
