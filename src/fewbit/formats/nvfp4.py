# SPDX-License-Identifier: Apache-2.0
"""NVFP4: E2M1 values in blocks of 16 under an E4M3 scale, all under one float32 scale of the tensor.

``w = (block_scale / global_scale) * E2M1[code]``. ``global_scale`` divides, as it does in the checkpoints of
compressed-tensors; it is ``448 * 6 / max|w|`` of the whole tensor, which puts the largest block scale on 448, the
largest E4M3 value. ``block_scale`` holds the bits of a float8_e4m3fn.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.table import E2M1, bounds_of, look_up, nearest

_E4M3_LARGEST = 448.0
_E4M3_SMALLEST = 2.0**-9
_LARGEST_GLOBAL = 2.0**100
"""Keeps the least block scale over it, 2^-109, a normal float32."""


@dataclass(frozen=True)
class NVFP4(Format):
    """``nvfp4``. True bits per weight: ``4 + 8 / 16``, and 32 bits a tensor.

    ``global_scale`` is None until :meth:`bind`; it serves ``fit`` only and is no part of the format's identity.
    """

    global_scale: float | None = field(default=None, compare=False)

    name = "nvfp4"
    bits = 4
    levels = len(E2M1)
    block = 16
    dim = 1
    params = (Param("block_scale", 8, torch.uint8), Param("global_scale", 32, torch.float32, per="tensor"))
    bounds = bounds_of(E2M1)

    def bind(self, weight: Tensor) -> NVFP4:
        return replace(self, global_scale=_global_scale(weight))

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """When not bound, ``blocks`` are taken for the whole tensor."""
        constant = _global_scale(blocks) if self.global_scale is None else self.global_scale
        shared = torch.full((*blocks.shape[:-1], 1), constant, dtype=torch.float32, device=blocks.device)
        scale = (blocks.abs().amax(-1, keepdim=True) / E2M1[-1] * shared).clamp(_E4M3_SMALLEST, _E4M3_LARGEST)
        return {"block_scale": scale.to(torch.float8_e4m3fn).view(torch.uint8), "global_scale": shared}

    def _scale(self, params: Params) -> Tensor:
        return params["block_scale"].view(torch.float8_e4m3fn).float() / params["global_scale"]

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        scale = self._scale(params)
        return nearest(blocks / torch.where(scale == 0, 1.0, scale), E2M1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self._scale(params) * look_up(codes, E2M1)

    def physical(self, params: Params) -> Physical:
        return Physical(self._scale(params).squeeze(-1), None, torch.tensor(E2M1, dtype=torch.float32))


def _global_scale(weight: Tensor) -> float:
    """The tensor's constant, as the float32 that is stored."""
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    exact = min(_E4M3_LARGEST * E2M1[-1] / largest, _LARGEST_GLOBAL) if largest > 0 else 1.0
    return float(torch.tensor(exact, dtype=torch.float32))
