# SPDX-License-Identifier: Apache-2.0
"""MXFP4: E2M1 values in blocks of 32 under a power-of-two scale (OCP Microscaling Formats v1.0, sections 5 and 6.3).

``w = 2^(exponent - 127) * E2M1[code]``. The rule of section 6.3: the exponent is ``floor(log2 max|w|) - 2``, where 2
is the exponent of 6, the largest E2M1 value; entries in (6, 8) times the scale saturate at 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import e8m0_decode, e8m0_encode
from fewbit.formats.table import E2M1, bounds_of, look_up, nearest


@dataclass(frozen=True)
class MXFP4(Format):
    """``mxfp4``. True bits per weight: ``4 + 8 / 32``."""

    name = "mxfp4"
    bits = 4
    levels = len(E2M1)
    block = 32
    dim = 1
    params = (Param("exponent", 8, torch.uint8),)
    bounds = bounds_of(E2M1)

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        top = blocks.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(top).exponent - 1  # floor(log2 top): frexp's mantissa lies in [1/2, 1)
        return {"exponent": e8m0_encode(torch.where(top > 0, exponent - 2, -127))}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        return nearest(blocks / e8m0_decode(params["exponent"]), E2M1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return e8m0_decode(params["exponent"]) * look_up(codes, E2M1)

    def physical(self, params: Params) -> Physical:
        return Physical(e8m0_decode(params["exponent"]).squeeze(-1), None, torch.tensor(E2M1, dtype=torch.float32))
