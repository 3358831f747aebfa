# SPDX-License-Identifier: Apache-2.0
"""Signs: ``w = +-scale``, code 1 is plus.

The scale is the (weighted) mean of ``|w|``, which minimises the squared error of the block (Rastegari et al. 2016,
arXiv:1603.05279, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import SMALLEST_SCALE, by_rows, divisor, spell_group, storable, weights


def mean_magnitude(blocks: Tensor, importance: Tensor) -> Tensor:
    """``sum h |w| / sum h`` of each block, (rows, blocks, 1) float32; 0 for a block of zeros.

    Summed in float64, so that neither overflow nor the order of a threaded sum shows in the float16 it becomes.
    """
    return by_rows(_mean_magnitude, blocks, importance)


def _mean_magnitude(blocks: Tensor, importance: Tensor) -> Tensor:
    share = weights(blocks, importance).double()
    mean = (blocks.abs() * share).sum(-1, keepdim=True) / share.sum(-1, keepdim=True).clamp_min(1e-300)
    return mean.float()


@dataclass(frozen=True)
class Sign(Format):
    """``sign/g{block}``. True bits per weight: ``1 + 16 / block``."""

    block: int

    bits = 1
    dim = 1
    params = (Param("scale", 16, torch.float16, least=SMALLEST_SCALE),)

    @property
    def name(self) -> str:
        return f"sign/{spell_group(self.block)}"

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        return {"scale": storable(mean_magnitude(blocks, importance))}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        return (blocks / divisor(params["scale"]) > 0).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return params["scale"].float() * (2 * codes.float() - 1)

    def physical(self, params: Params) -> Physical:
        """Affine: ``2 scale * code - scale``, exact in float32."""
        scale = params["scale"].float().squeeze(-1)
        return Physical(2 * scale, -scale, None)
