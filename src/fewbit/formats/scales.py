# SPDX-License-Identifier: Apache-2.0
"""What formats share about scales: how they are stored (positive and finite), spelt, divided by and weighed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core import float16

SMALLEST_SCALE = 2.0**-24
"""The least positive float16: a constant-zero block gets this scale, never 0 or NaN."""

_CHUNK = 1 << 20
"""Entries that :func:`by_rows` handles at once."""

_E8M0 = (*(2.0 ** (code - 127) for code in range(255)), float("nan"))


def storable(scale: Tensor, smallest: float = SMALLEST_SCALE) -> Tensor:
    """``scale`` rounded to float16, kept positive and finite."""
    return scale.clamp(smallest, float16.LARGEST).to(torch.float16)


def divisor(scale: Tensor) -> Tensor:
    """``scale`` as float32 to divide by: files of other tools hold zero scales, where 1 gives code "zero", not NaN."""
    scale = scale.float()
    return torch.where(scale == 0, 1.0, scale)


def e8m0_decode(codes: Tensor) -> Tensor:
    """uint8 exponent ``e`` -> float32 ``2^(e - 127)``; 255 is NaN (OCP Microscaling Formats v1.0, section 5.4.1)."""
    return torch.tensor(_E8M0, dtype=torch.float32, device=codes.device)[codes.int()]


def e8m0_encode(exponent: Tensor) -> Tensor:
    """Integer exponents -> uint8, kept within 2^-126 .. 2^127: a scale is always a normal float32."""
    return (exponent + 127).clamp(1, 254).to(torch.uint8)


def weights(blocks: Tensor, importance: Tensor) -> Tensor:
    """``importance`` of every entry of ``blocks``, at most 1 in each block so that sums neither overflow nor vanish.

    A block whose importance is zero throughout (inputs that calibration never saw) counts its non-zero entries alike.
    """
    spread = importance.expand_as(blocks)
    top = spread.amax(-1, keepdim=True)
    return torch.where(top > 0, spread / top.clamp_min(torch.finfo(torch.float32).tiny), (blocks != 0).float())


def by_rows(function: Callable[[Tensor, Tensor], Tensor], blocks: Tensor, importance: Tensor) -> Tensor:
    """``function(blocks, importance)``, some rows at a time: sums in float64 then take no memory to speak of."""
    step = max(1, _CHUNK // max(1, blocks.shape[1] * blocks.shape[2]))
    if blocks.shape[0] <= step:
        return function(blocks, importance)
    shares = importance.expand_as(blocks)
    return torch.cat(
        [function(b, s) for b, s in zip(torch.split(blocks, step), torch.split(shares, step), strict=True)]
    )


def spell_group(block: int) -> str:
    """``g64``, or ``channel`` for a whole row."""
    return f"g{block}" if block else "channel"
