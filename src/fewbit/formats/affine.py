# SPDX-License-Identifier: Apache-2.0
"""Uniform integers: ``w = scale * (code - zero)``, 1 to 8 bits, symmetric or asymmetric.

Symmetric (the convention of GPTQ and compressed-tensors): ``scale = 2 max|w| / (levels - 1)`` and the fixed zero
``levels / 2``, so codes span the full range -2^(b-1) .. 2^(b-1) - 1. With 1 bit that range would be {-s, 0}; there the
zero is 1/2 and the scale 2 E|w|, which makes the two values +-E|w|.

Asymmetric: the range is widened to contain 0, ``scale = (hi - lo) / (levels - 1)``, ``zero = round(-lo / scale)``
stored on b bits (Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params, Physical

SMALLEST_SCALE = 2.0**-24
"""The least positive float16: a constant-zero block gets this scale, never 0 or NaN."""
LARGEST_SCALE = 65504.0


def storable(scale: Tensor) -> Tensor:
    """``scale`` rounded to float16, kept positive and finite."""
    return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)


@dataclass(frozen=True)
class Affine(Format):
    """``int{bits}/g{block}/{sym|asym}``; ``block == 0`` is spelt ``channel``.

    True bits per weight: ``bits + 16 / block`` symmetric, ``bits + (16 + bits) / block`` asymmetric.
    """

    bits: int
    block: int
    symmetric: bool

    dim = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        group = f"g{self.block}" if self.block else "channel"
        return f"int{self.bits}/{group}/{'sym' if self.symmetric else 'asym'}"

    @property
    def levels(self) -> int:  # type: ignore[override]
        return 2**self.bits

    @property
    def fit_block(self) -> int:  # type: ignore[override]
        return self.block

    @property
    def params(self) -> tuple[Param, ...]:  # type: ignore[override]
        scale = Param("scale", 16, torch.float16)
        return (scale,) if self.symmetric else (scale, Param("zero_point", self.bits, torch.uint8))

    @property
    def middle(self) -> float:
        """The zero of the symmetric grid, in codes."""
        return self.levels / 2 if self.bits > 1 else 0.5

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        top = self.levels - 1
        if self.symmetric and self.bits == 1:
            weight = importance.expand_as(blocks)
            mean = (blocks.abs() * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp_min(1e-30)
            return {"scale": storable(2 * mean)}
        if self.symmetric:
            return {"scale": storable(2 * blocks.abs().amax(-1, keepdim=True) / top)}
        low = blocks.amin(-1, keepdim=True).clamp_max(0)
        high = blocks.amax(-1, keepdim=True).clamp_min(0)
        scale = storable((high - low) / top)
        return {"scale": scale, "zero_point": (-low / scale.float()).round().clamp(0, top).to(torch.uint8)}

    def _zero(self, params: Params) -> Tensor | float:
        return self.middle if self.symmetric else params["zero_point"].float()

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        codes = blocks / params["scale"].float() + self._zero(params)
        return codes.round().clamp(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return params["scale"].float() * (codes.float() - self._zero(params))

    def physical(self, params: Params) -> Physical:
        scale = params["scale"].float()
        return Physical(scale.squeeze(-1), (-scale * self._zero(params)).squeeze(-1), None)
