# SPDX-License-Identifier: Apache-2.0
"""ggml's Q6_K: ``int6/g16x16/sym/s8``, 210 bytes for 256 weights, 6.5625 bits a weight.

::

    byte    0-127  ql      bits 0-3 of the codes: 64 bytes a half of 128 codes,
                           byte j: code j in bits 0-3, code j + 64 in bits 4-7
    byte  128-191  qh      bits 4-5 of the codes: 32 bytes a half,
                           byte j: code j + 32 k in bits 2k, 2k + 1
    byte  192-207  scales  int8, one for 16 weights; sc = scale_code - 128
    byte  208-209  d       float16     w = d * sc * (code - 32)
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.ggml import as_half, cut, half_bytes, halves, join, only, quarters, unhalve, unquarter

_SPAN = 256


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, spans = shape[0], shape[1] // _SPAN
    parts = codes.reshape(rows, spans, 2, 128)
    low = halves(parts & 15).reshape(rows, spans, 128)
    high = quarters(parts >> 4).reshape(rows, spans, 64)
    scales = params["scale_code"].reshape(rows, spans, 16) ^ 128
    return join(low, high, scales, half_bytes(params["super_scale"][:, ::16])), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, blocks = shape[0], shape[1] // 16
    low, high, scales, unit = cut(packed, shape, _SPAN, (128, 64, 16, 2))
    codes = unhalve(low.reshape(rows, -1, 2, 64)) | unquarter(high.reshape(rows, -1, 2, 32)) << 4
    return codes.reshape(shape), {
        "scale_code": scales.reshape(rows, blocks, 1) ^ 128,
        "super_scale": B.per_block(as_half(unit), blocks, 16),
    }


Q6_K = Layout("q6_k", only("int6/g16x16/sym/s8", _SPAN), _pack, _unpack)
