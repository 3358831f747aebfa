# SPDX-License-Identifier: Apache-2.0
"""Uniform integers: ``w = scale * (code - zero)``, 1 to 8 bits, symmetric or asymmetric.

Symmetric (the convention of GPTQ and compressed-tensors): ``scale = 2 max|w| / (levels - 1)`` and the fixed zero
``levels / 2``, so codes span the full range -2^(b-1) .. 2^(b-1) - 1. With 1 bit that range would be {-s, 0}; there the
zero is 1/2 and the scale 2 E|w|, which makes the two values +-E|w|.

With ``tensor`` the whole matrix is one block: one scale, and one zero, for all its rows. As a format of activations,
that makes what a token becomes depend on its company.

Asymmetric: the range is widened to contain 0, ``scale = (hi - lo) / (levels - 1)``, ``zero = round(-lo / scale)``
stored on b bits (Jacob et al. 2018, arXiv:1712.05877).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import SMALLEST_SCALE, divisor, spell_group, storable
from fewbit.formats.sign import mean_magnitude


@dataclass(frozen=True)
class Affine(Format):
    """``int{bits}/g{block}/{sym|asym}[/clip{clip}]``; ``block == 0`` is spelt ``channel``, or ``tensor`` if ``whole``.

    ``clip``: the part of the range that the grid spans; what lies beyond is cut off. Below 1 it serves activations,
    whose range nobody searches.

    True bits per weight: ``bits + 16 / block`` symmetric, ``bits + (16 + bits) / block`` asymmetric, of
    a whole tensor ``bits`` and 16 or ``16 + bits`` bits a tensor.
    """

    bits: int
    block: int
    symmetric: bool
    clip: float = 1.0
    whole: bool = False

    dim = 1

    @cached_property
    def name(self) -> str:
        kind, clip = "sym" if self.symmetric else "asym", "" if self.clip == 1 else f"/clip{self.clip:g}"
        return f"int{self.bits}/{'tensor' if self.whole else spell_group(self.block)}/{kind}{clip}"

    @cached_property
    def params(self) -> tuple[Param, ...]:
        per: Literal["tensor", "block"] = "tensor" if self.whole else "block"
        scale = Param("scale", 16, torch.float16, per, least=SMALLEST_SCALE)
        return (scale,) if self.symmetric else (scale, Param("zero_point", self.bits, torch.uint8, per))

    @property
    def group_rows(self) -> int:  # type: ignore[override]
        return 0 if self.whole else 1

    @cached_property
    def grid(self) -> Literal["", "magnitude", "ends"]:  # type: ignore[override]
        if self.whole:
            return ""  # of a block
        if self.symmetric:
            return "magnitude" if self.bits > 1 else ""
        return "ends"

    @cached_property
    def even(self) -> bool:  # type: ignore[override]
        return self.clip == 1 and self.grid != ""

    @property
    def middle(self) -> float:
        """The zero of the symmetric grid, in codes."""
        return self.levels / 2 if self.bits > 1 else 0.5

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        if self.whole and blocks.numel():
            flat = (each.expand_as(blocks).reshape(1, 1, -1) for each in (blocks, importance))
            found = replace(self, whole=False).fit(*flat)
            return {name: values.expand(*blocks.shape[:2], 1) for name, values in found.items()}
        top = self.levels - 1
        if self.symmetric and self.bits == 1:
            return {"scale": storable(2 * mean_magnitude(blocks, importance))}
        if self.symmetric:
            return {"scale": storable(2 * self.clip * blocks.abs().amax(-1, keepdim=True) / top)}
        low = self.clip * blocks.amin(-1, keepdim=True).clamp_max(0)
        high = self.clip * blocks.amax(-1, keepdim=True).clamp_min(0)
        scale = storable((high - low) / top)
        return {"scale": scale, "zero_point": (-low / scale.float()).round().clamp(0, top).to(torch.uint8)}

    def placed(self, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
        if not self.grid:
            return super().placed(scale, offset)
        stored = storable(scale.abs())
        if self.symmetric:
            return {"scale": torch.where(scale < 0, -stored, stored)}
        zero = (-offset / stored.float()).round().clamp(0, self.levels - 1)
        return {"scale": stored, "zero_point": zero.to(torch.uint8)}

    def even_grids(self, params: Params) -> tuple[Tensor, Tensor]:
        if not self.even:
            return super().even_grids(params)
        scale = divisor(params["scale"])
        return scale, torch.full_like(scale, self.middle) if self.symmetric else params["zero_point"].float()

    def of_even_grids(self, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        if not self.even:
            return super().of_even_grids(scale, zero)
        stored = {"scale": scale.to(torch.float16)}
        return stored if self.symmetric else {**stored, "zero_point": zero.to(torch.uint8)}

    def _zero(self, params: Params) -> Tensor | float:
        return self.middle if self.symmetric else params["zero_point"].float()

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        codes = blocks / divisor(params["scale"]) + self._zero(params)
        return codes.round().clamp(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return params["scale"].float() * (codes.float() - self._zero(params))

    def nearest(self, blocks: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        zero = self._zero(params)
        by = params["divisor"] if "divisor" in params else divisor(params["scale"])
        codes = (blocks / by).add_(zero).round_().clamp_(0, self.levels - 1)
        return codes, (codes - zero).mul_(params["scale"].float())

    def working(self, params: Params) -> Params:
        wide = {name: values.float() for name, values in params.items()}
        return {**wide, "divisor": divisor(params["scale"])}

    def physical(self, params: Params) -> Physical:
        """Equal to ``decode`` bit for bit: every product and the sum fit in a float32's 24 bits."""
        scale = params["scale"].float()
        return Physical(scale.squeeze(-1), (-scale * self._zero(params)).squeeze(-1), None)
