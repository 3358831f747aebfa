# SPDX-License-Identifier: Apache-2.0
"""ggml's Q4_0: ``int4/g32/sym``, 18 bytes for 32 weights, 4.5 bits a weight.

::

    byte  0-1   d   float16, of either sign     w = d * (code - 8)
    byte  2-17  qs                              byte j: code j in bits 0-3, code j + 16 in bits 4-7
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.ggml import as_half, cut, half_bytes, halves, join, only, unhalve


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return join(half_bytes(params["scale"]), halves(B.split(codes, 32))), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    scale, nibbles = cut(packed, shape, 32, (2, 16))
    return B.join(unhalve(nibbles), shape[1]), {"scale": as_half(scale)}


Q4_0 = Layout("q4_0", only("int4/g32/sym", 32), _pack, _unpack)
