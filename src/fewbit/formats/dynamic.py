# SPDX-License-Identifier: Apache-2.0
"""Scales that are coded themselves, the double quantization of QLoRA (Dettmers et al. 2023, arXiv:2305.14314)::

    scale = scale_mean + super_scale * DYNAMIC[scale_code]

``scale_mean`` is one float32 of the tensor, ``super_scale`` a float32 of each :data:`CHUNK` blocks in the order of rows
(the largest ``|scale - scale_mean|`` among them), ``scale_code`` 8 bits of a block. The dynamic map (Dettmers 2015,
arXiv:1511.04561) has 256 values: 0, 1, and in both signs, for i = 0 .. 6, the middles of 2^i equal parts of
[0.1, 1] times 10^(i - 6): many values for what is large, and some for what is small.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fewbit.core import float16
from fewbit.core.format import Param, Params

CHUNK = 256
"""Blocks that share a super scale."""


def dynamic_map() -> tuple[float, ...]:
    """The 256 values, ascending; code 127 is 0, code 255 is 1."""
    positive = []
    for i in range(7):
        ends = [0.1 + 0.9 * k / 2**i for k in range(2**i + 1)]
        positive += [(low + high) / 2 * 10.0 ** (i - 6) for low, high in itertools.pairwise(ends)]
    return (*(-value for value in reversed(positive)), 0.0, *positive, 1.0)


DYNAMIC = dynamic_map()

PARAMS = (
    Param("scale_code", 8, torch.uint8),
    Param("super_scale", 32, torch.float32, per="chunk"),
    Param("scale_mean", 32, torch.float32, per="tensor"),
)


def code_scales(scale: Tensor) -> dict[str, Tensor]:
    """Float32 ``scale`` (rows, blocks, 1) of a whole tensor as it is stored."""
    mean = scale.mean(dtype=torch.float64).float()
    apart = scale - mean
    flat = apart.abs().flatten()
    chunks = torch.nn.functional.pad(flat, (0, -len(flat) % CHUNK)).reshape(-1, CHUNK).amax(1)
    unit = chunks.repeat_interleave(CHUNK)[: len(flat)].reshape(scale.shape)
    values = torch.tensor(DYNAMIC, dtype=torch.float32, device=scale.device)
    code = torch.bucketize(apart / torch.where(unit == 0, 1.0, unit), (values[1:] + values[:-1]) / 2)
    return {"scale_code": code.to(torch.uint8), "super_scale": unit, "scale_mean": mean.expand(scale.shape)}


def decode_scales(params: Params, smallest: float) -> Tensor:
    """Float32 (rows, blocks, 1): ``smallest`` where a coded scale would be less, which the mean can do to one that is
    far below it."""
    values = torch.tensor(DYNAMIC, dtype=torch.float32, device=params["scale_code"].device)
    apart = params["super_scale"] * values[params["scale_code"].int()]
    return (params["scale_mean"] + apart).clamp(smallest, float16.LARGEST)
