# SPDX-License-Identifier: Apache-2.0
"""Ternary: ``w = scale * (code - 1)``, code 0, 1 or 2.

The scale minimises ``sum h (w - scale t)^2`` over the scale and all ``t`` in {-1, 0, 1}, exactly. For a given set S of
non-zero entries the best scale is ``sum_S h|w| / sum_S h`` and removes ``(sum_S h|w|)^2 / sum_S h`` of the error; for a
given scale the best S is every ``|w| > scale / 2``. So the best S is a head of the magnitudes in descending order, and
trying every head finds it. The usual rule (TWN, arXiv:1605.04711) takes the head at ``0.7 E|w|`` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import SMALLEST_SCALE, by_rows, divisor, spell_group, storable, weights


def best_scale(blocks: Tensor, importance: Tensor) -> Tensor:
    """The exact minimiser, (rows, blocks, 1) float32; 0 for a block of zeros."""
    return by_rows(_best_scale, blocks, importance)


def _best_scale(blocks: Tensor, importance: Tensor) -> Tensor:
    top = blocks.abs().amax(-1, keepdim=True)
    # relative to the largest entry: nothing overflows when squared
    magnitude, order = (blocks.abs() / top.clamp_min(torch.finfo(torch.float32).tiny)).sort(-1, descending=True)
    share = weights(blocks, importance).gather(-1, order).double()
    kept = (share * magnitude).cumsum(-1)
    mass = share.cumsum(-1).clamp_min(1e-300)
    head = (kept.square() / mass).argmax(-1, keepdim=True)
    return (kept.gather(-1, head) / mass.gather(-1, head)).float() * top


@dataclass(frozen=True)
class Ternary(Format):
    """``ternary/g{block}``. True bits a weight: ``1.6 + 16 / block`` in base 3, ``2 + 16 / block`` in 2-bit fields."""

    block: int

    bits = 2
    levels = 3
    dim = 1
    params = (Param("scale", 16, torch.float16, least=SMALLEST_SCALE),)

    @property
    def name(self) -> str:
        return f"ternary/{spell_group(self.block)}"

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        return {"scale": storable(best_scale(blocks, importance))}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        return ((blocks / divisor(params["scale"])).round().clamp(-1, 1) + 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return params["scale"].float() * (codes.float() - 1)

    def physical(self, params: Params) -> Physical:
        """Affine: ``scale * code - scale``, exact in float32."""
        scale = params["scale"].float().squeeze(-1)
        return Physical(scale, -scale, None)
