# SPDX-License-Identifier: Apache-2.0
"""ggml's TQ1_0: ``ternary/g256``, 54 bytes for 256 weights, 1.6875 bits a weight.

::

    byte   0-31  qs[0:32]    byte j: codes j, j + 32, j + 64, j + 96, j + 128
    byte  32-47  qs[32:48]   byte j: codes 160 + j, + 16, + 32, + 48, + 64
    byte  48-51  qh          byte j: codes 240 + j, + 4, + 8, + 12, and a fifth digit that is 0
    byte  52-53  d           float16     w = d * (code - 1)

The five codes t0 .. t4 of a byte are the base-3 digits of ``v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4``, stored as the
fraction ``ceil(256 v / 243)`` of a byte: multiplying it by 3 brings digit after digit into bits 8 and up. Of the 256
bytes 243 occur; the others decode to the same codes as a neighbour and are refused, since they would not come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape
from fewbit.errors import InputError
from fewbit.layouts.ggml import as_half, cut, half_bytes, join, only

_SPAN = 256
_POWERS = (81, 27, 9, 3, 1)
_FIELDS = ((32, 5), (16, 5), (4, 4))
"""Bytes, and codes in each, of the three parts of a struct."""


def _digits(codes: Tensor, size: int, count: int) -> Tensor:
    """uint8 (rows, spans, size * count) -> the bytes (rows, spans, size); code ``j + size n`` is digit n of byte j."""
    parts = codes.reshape(*codes.shape[:2], count, size)
    value = torch.zeros(*codes.shape[:2], size, dtype=torch.int32)
    for digit in range(count):
        value += parts[..., digit, :].int() * _POWERS[digit]
    return ((value * 256 + 242) // 243).to(torch.uint8)


def _codes(data: Tensor, count: int) -> Tensor:
    """Inverse of :func:`_digits`, (rows, spans, size * count) with the digits of each place together.

    Byte arithmetic wraps modulo 256, which is what drops the digits already read.
    """
    return torch.cat([((data * 3**digit).int() * 3 >> 8).to(torch.uint8) for digit in range(count)], -1)


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    spans = codes.reshape(shape[0], shape[1] // _SPAN, _SPAN)
    parts = torch.split(spans, [size * count for size, count in _FIELDS], -1)
    fields = [_digits(part, size, count) for part, (size, count) in zip(parts, _FIELDS, strict=True)]
    return join(*fields, half_bytes(params["scale"])), {}


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    *fields, scale = cut(packed, shape, _SPAN, (32, 16, 4, 2))
    parts = [_codes(field, count) for field, (_, count) in zip(fields, _FIELDS, strict=True)]
    for part, field, (size, count) in zip(parts, fields, _FIELDS, strict=True):
        if not torch.equal(_digits(part, size, count), field):
            raise InputError("TQ1_0 blocks", "found a byte that no five base-3 digits encode to")
    return torch.cat(parts, -1).reshape(shape), {"scale": as_half(scale)}


TQ1_0 = Layout("tq1_0", only("ternary/g256", _SPAN), _pack, _unpack)
