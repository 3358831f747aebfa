# SPDX-License-Identifier: Apache-2.0
"""ggml's Q4_1: ``int4/g32/min``, 20 bytes for 32 weights, 5 bits a weight.

::

    byte  0-1   d   float16
    byte  2-3   m   float16     w = d * code + m
    byte  4-19  qs              byte j: code j in bits 0-3, code j + 16 in bits 4-7
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.ggml import as_half, cut, half_bytes, halves, join, only, unhalve


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return join(half_bytes(params["scale"]), half_bytes(params["minimum"]), halves(B.split(codes, 32))), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    scale, minimum, nibbles = cut(packed, shape, 32, (2, 2, 16))
    return B.join(unhalve(nibbles), shape[1]), {"scale": as_half(scale), "minimum": as_half(minimum)}


Q4_1 = Layout("q4_1", only("int4/g32/min", 32), _pack, _unpack)
