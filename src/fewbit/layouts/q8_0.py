# SPDX-License-Identifier: Apache-2.0
"""ggml's Q8_0: ``int8/g32/sym``, 34 bytes for 32 weights, 8.5 bits a weight.

::

    byte  0-1   d   float16     w = d * q
    byte  2-33  q   int8        q = code - 128
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.ggml import as_half, cut, half_bytes, join, only


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return join(half_bytes(params["scale"]), B.split(codes ^ 128, 32)), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    scale, codes = cut(packed, shape, 32, (2, 32))
    return B.join(codes, shape[1]) ^ 128, {"scale": as_half(scale)}


Q8_0 = Layout("q8_0", only("int8/g32/sym", 32), _pack, _unpack)
