# SPDX-License-Identifier: Apache-2.0
"""Uniform integers whose scales are themselves coded: ``repeat`` blocks form a span under float16 super scales.

Symmetric, signed scale codes of s bits (ggml's Q6_K is ``int6/g16x16/sym/s8``)::

    w = super_scale * (scale_code - 2^(s-1)) * (code - 2^(b-1))

Asymmetric, unsigned codes for scales and minima (ggml's Q4_K is ``int4/g32x8/asym/s6``)::

    w = super_scale * scale_code * code - super_minimum * minimum_code

The scale of a block is that of :mod:`fewbit.formats.affine`; the largest of a span gets the largest scale code. The
minimum is coded first and the scale then covers what is left of the range, so that both ends of a block stay in reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import float16
from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import SMALLEST_SCALE, divisor, storable

_FINEST = 2.0**-14
"""Least scale as a part of the minimum: finer steps would drown in the float32 sum, and codes could not come back."""


@dataclass(frozen=True)
class Superblock(Format):
    """``int{bits}/g{block}x{repeat}/{sym|asym}/s{scale_bits}``.

    True bits per weight: ``bits + scale_bits / block + 16 / (block * repeat)`` symmetric,
    ``bits + 2 scale_bits / block + 32 / (block * repeat)`` asymmetric.
    """

    bits: int
    block: int
    repeat: int
    symmetric: bool
    scale_bits: int

    dim = 1

    @property
    def name(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        return f"int{self.bits}/g{self.block}x{self.repeat}/{kind}/s{self.scale_bits}"

    @property
    def fit_block(self) -> int:
        return self.block * self.repeat

    @property
    def grid(self) -> Literal["", "magnitude", "ends"]:  # type: ignore[override]
        return "magnitude" if self.symmetric else "ends"

    @property
    def params(self) -> tuple[Param, ...]:
        scales = (
            Param("scale_code", self.scale_bits, torch.uint8),
            Param("super_scale", 16, torch.float16, per="span", least=SMALLEST_SCALE),
        )
        if self.symmetric:
            return scales
        return (
            *scales,
            Param("minimum_code", self.scale_bits, torch.uint8),
            Param("super_minimum", 16, torch.float16, per="span"),
        )

    @property
    def _bias(self) -> int:
        """What a scale code of 0 stands for, negated."""
        return 1 << (self.scale_bits - 1) if self.symmetric else 0

    @property
    def _top(self) -> int:
        """Largest multiple of the super scale."""
        return (1 << self.scale_bits) - 1 - self._bias

    def _largest(self, values: Tensor) -> Tensor:
        """(rows, blocks, 1) -> the largest of its span at each block, (rows, blocks, 1)."""
        blocks = values.shape[1]
        spans = B.split(values.squeeze(-1), self.repeat).amax(-1, keepdim=True)
        return B.per_block(spans, blocks, self.repeat)

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        if self.symmetric:
            return self._fit_scale(2 * blocks.abs().amax(-1, keepdim=True))
        depth = -blocks.amin(-1, keepdim=True).clamp_max(0)  # how far below zero a block reaches
        unit = float16.of(self._largest(depth) / self._top)
        code = (depth / divisor(unit)).round().clamp(0, self._top)
        reach = blocks.amax(-1, keepdim=True).clamp_min(0) + unit.float() * code
        params = self._fit_scale(torch.maximum(reach, depth))
        return {**params, "minimum_code": code.to(torch.uint8), "super_minimum": unit}

    def _fit_scale(self, extent: Tensor) -> dict[str, Tensor]:
        """Scale codes, at least 1, and super scales for blocks that span ``extent`` (rows, blocks, 1)."""
        scale = extent / (self.levels - 1)
        unit = storable(self._largest(scale) / self._top)
        code = (scale / unit.float()).round().clamp(1, self._top) + self._bias
        return {"scale_code": code.to(torch.uint8), "super_scale": unit}

    def placed(self, scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
        if self.symmetric:
            unit = storable(self._largest(scale.abs()) / self._top)
            code = (scale / unit.float()).round().clamp(-self._bias, self._top)
            code = torch.where(code == 0, torch.where(scale < 0, -1.0, 1.0), code) + self._bias
            return {"scale_code": code.to(torch.uint8), "super_scale": unit}
        depth = (-offset).clamp_min(0)
        low = float16.of(self._largest(depth) / self._top)
        minimum = (depth / divisor(low)).round().clamp(0, self._top).to(torch.uint8)
        scale = torch.maximum(scale, depth * _FINEST)
        unit = storable(self._largest(scale) / self._top)
        code = (scale / unit.float()).round().clamp(1, self._top)
        return {
            "scale_code": code.to(torch.uint8),
            "super_scale": unit,
            "minimum_code": minimum,
            "super_minimum": low,
        }

    def _scale(self, params: Params) -> Tensor:
        return params["super_scale"].float() * (params["scale_code"].float() - self._bias)

    def _offset(self, scale: Tensor, params: Params) -> Tensor:
        if self.symmetric:
            return -scale * (self.levels / 2)
        return -(params["super_minimum"].float() * params["minimum_code"].float())

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        scale = self._scale(params)
        codes = (blocks - self._offset(scale, params)) / divisor(scale)
        return codes.round().clamp(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """In ggml's own order: the scale and the offset are exact in float32, only their sum rounds."""
        scale = self._scale(params)
        return scale * codes.float() + self._offset(scale, params)

    def physical(self, params: Params) -> Physical:
        scale = self._scale(params)
        return Physical(scale.squeeze(-1), self._offset(scale, params).squeeze(-1), None)
