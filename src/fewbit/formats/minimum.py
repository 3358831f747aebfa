# SPDX-License-Identifier: Apache-2.0
"""Uniform integers above a float minimum: ``w = scale * code + minimum``, both float16 (ggml's Q4_1 and Q5_1).

Unlike a zero point on the grid, the minimum is free: a block far from zero spends no code on zero. The scale is fitted
after the minimum has been rounded to float16, so the largest weight stays within reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core import float16
from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import SMALLEST_SCALE, divisor, spell_group, storable

_FINEST = 2.0**-14
"""Least scale as a part of ``|minimum|``. The minimum itself is off by up to 2^-12 of it, so a finer scale buys little,
and near 2^-24 ``scale * code`` would drown in the float32 sum and codes could not come back."""


@dataclass(frozen=True)
class Minimum(Format):
    """``int{bits}/g{block}/min``. True bits per weight: ``bits + 32 / block``."""

    bits: int
    block: int

    dim = 1
    free_offset = True
    grid = "ends"
    params = (Param("scale", 16, torch.float16, least=SMALLEST_SCALE), Param("minimum", 16, torch.float16))

    @property
    def name(self) -> str:
        return f"int{self.bits}/{spell_group(self.block)}/min"

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        exists = (importance > 0) | (blocks != 0)  # false on padding
        exists = exists | ~exists.any(-1, keepdim=True)  # a block of zeros
        low = torch.where(exists, blocks, torch.inf).amin(-1, keepdim=True)
        high = torch.where(exists, blocks, -torch.inf).amax(-1, keepdim=True)
        minimum = float16.of(low)
        return {"scale": _coarse((high - minimum.float()) / (self.levels - 1), minimum), "minimum": minimum}

    def with_offset(self, params: Params, offset: Tensor) -> dict[str, Tensor]:
        minimum = float16.of(offset)
        return {"scale": _coarse(params["scale"].float(), minimum), "minimum": minimum}

    def placed(self, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
        minimum = float16.of(offset)
        return {"scale": _coarse(scale, minimum), "minimum": minimum}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        codes = (blocks - params["minimum"].float()) / divisor(params["scale"])
        return codes.round().clamp(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return params["scale"].float() * codes.float() + params["minimum"].float()

    def nearest(self, blocks: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        minimum = params["minimum"].float()
        codes = (blocks - minimum).div_(divisor(params["scale"])).round_().clamp_(0, self.levels - 1)
        return codes, (codes * params["scale"].float()).add_(minimum)

    def physical(self, params: Params) -> Physical:
        return Physical(params["scale"].float().squeeze(-1), params["minimum"].float().squeeze(-1), None)


def _coarse(scale: Tensor, minimum: Tensor) -> Tensor:
    """``scale`` as stored, not finer than ``minimum`` allows."""
    return storable(torch.maximum(scale, minimum.float().abs() * _FINEST))
