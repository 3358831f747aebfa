# SPDX-License-Identifier: Apache-2.0
"""ggml's Q4_K: ``int4/g32x8/asym/s6``, 144 bytes for 256 weights, 4.5 bits a weight.

::

    byte   0-1    d       float16
    byte   2-3    dmin    float16     w = d * sc[i] * code - dmin * m[i] in block i of 32, i < 8
    byte   4-15   scales  6-bit sc and m, below
    byte  16-143  qs      32 bytes for two blocks 2k, 2k + 1:
                          byte j: code j of block 2k in bits 0-3, code j of block 2k + 1 in bits 4-7

    scales, byte i < 4:       sc[i] in bits 0-5,          bits 4-5 of sc[i+4] in bits 6-7
    scales, byte i + 4 < 8:   m[i]  in bits 0-5,          bits 4-5 of m[i+4]  in bits 6-7
    scales, byte i + 8 < 12:  bits 0-3 of sc[i+4] in bits 0-3,  bits 0-3 of m[i+4] in bits 4-7
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.ggml import as_half, cut, half_bytes, halves, join, only, unhalve

_SPAN = 256


def pack_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """6-bit (rows, spans, 8) twice -> uint8 (rows, spans, 12)."""
    low_s, high_s = scale.chunk(2, -1)
    low_m, high_m = minimum.chunk(2, -1)
    return torch.cat(
        [low_s | high_s >> 4 << 6, low_m | high_m >> 4 << 6, (high_s & 15) | (high_m & 15) << 4],
        -1,
    )


def unpack_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_scales`."""
    first, second, third = data.chunk(3, -1)
    scale = torch.cat([first & 63, (third & 15) | first >> 6 << 4], -1)
    minimum = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    return scale, minimum


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, spans = shape[0], shape[1] // _SPAN
    scales = pack_scales(*(params[name].reshape(rows, spans, 8) for name in ("scale_code", "minimum_code")))
    nibbles = halves(codes.reshape(rows, spans, 4, 64)).reshape(rows, spans, 128)
    units = (half_bytes(params[name][:, ::8]) for name in ("super_scale", "super_minimum"))
    return join(*units, scales, nibbles), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, blocks = shape[0], shape[1] // 32
    unit, unit_m, scales, nibbles = cut(packed, shape, _SPAN, (2, 2, 12, 128))
    scale, minimum = unpack_scales(scales)
    codes = unhalve(nibbles.reshape(rows, -1, 4, 32)).reshape(shape)
    return codes, {
        "scale_code": scale.reshape(rows, blocks, 1),
        "super_scale": B.per_block(as_half(unit), blocks, 8),
        "minimum_code": minimum.reshape(rows, blocks, 1),
        "super_minimum": B.per_block(as_half(unit_m), blocks, 8),
    }


Q4_K = Layout("q4_k", only("int4/g32x8/asym/s6", _SPAN), _pack, _unpack)
