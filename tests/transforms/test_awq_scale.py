# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale search against an oracle that runs the tokens, and the channels that the paper does not speak of."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats
from fewbit.core.facts import Facts
from fewbit.errors import InputError
from fewbit.methods import rtn
from fewbit.transforms import awq
from fewbit.transforms.awq import candidate
from oracle.awq_oracle import rounded, scale_search, scales

INT3 = formats.parse("int3/g8/asym")
HALF = 2.0**-11
"""Relative rounding error of float16."""


def sample(columns: int = 24, rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and inputs (tokens, columns) of channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(70, columns, generator=generator) * torch.randn(columns, generator=generator).mul(1.5).exp()
    return torch.randn(rows, columns, generator=generator) * 0.05, x


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_power_that_loses_least_on_the_tokens(seed: int) -> None:
    """The oracle's s is not rounded to float16, which moves losses a little: two powers may change places."""
    weight, x = sample(seed=seed)
    w, tokens = weight.double().numpy(), x.double().numpy()
    losses = scale_search(w, tokens, 8, 8, 20)
    scale = awq(weight, Facts.of(x, gram=True), 0, INT3)
    s = 1 / scale.scale.double().numpy()
    lost = (((tokens / s) @ rounded(w * s, 8, 8).T - tokens @ w.T) ** 2).sum(1).mean()
    assert lost <= min(losses) * 1.05 and min(losses) < losses[0] * 0.9
    power = min(range(20), key=lambda step: np.abs(np.log(s / scales(tokens, step / 20))).max())
    np.testing.assert_allclose(s, scales(tokens, power / 20), rtol=2 * HALF)
    assert losses[power] <= min(losses) * 1.05 and power > 0


def test_even_inputs_are_not_scaled() -> None:
    """No power changes anything where all channels are alike; the first, no scaling, wins the tie."""
    weight, _ = sample()
    x = torch.ones(5, 24)
    x[::2] = -1
    assert bool(awq(weight, Facts.of(x, gram=True), 0, INT3).scale.eq(1).all())


def test_channels_that_were_always_zero() -> None:
    magnitude = torch.tensor([0.0, 1.0, 100.0])
    assert candidate(magnitude, 0.0).scale.tolist() == [1, 1, 1]
    s = torch.tensor([1e-4, 1.0, 10.0], dtype=torch.float64)
    expected = (s.max() * s.min()).sqrt() / s
    assert torch.allclose(candidate(magnitude, 0.5).scale.double(), expected, rtol=2 * HALF, atol=0)


def test_without_a_token_or_for_a_single_step_nothing_is_scaled() -> None:
    weight, x = sample()
    assert bool(awq(weight, Facts.none(24), 0, INT3).scale.eq(1).all())
    assert bool(awq(weight, Facts.of(x, gram=True), 0, INT3, steps=1).scale.eq(1).all())


@pytest.mark.parametrize("name", ["nf4/g8", "int4/channel/sym", "mxfp4", "nvfp4", "vector2x4"])
def test_never_worse_than_no_scaling_in_any_format(name: str) -> None:
    weight, x = sample(rows=16)
    format = formats.parse(name)
    scale = awq(weight, Facts.of(x, gram=True), 0, format)
    lost = (x @ (scale.unweight(rtn(scale.weight(weight), format).dequantize()) - weight).T).square().sum()
    plain = (x @ (rtn(weight, format).dequantize() - weight).T).square().sum()
    assert lost <= plain * (1 + 1e-4)


def test_what_it_cannot_use_is_refused() -> None:
    weight, x = sample()
    facts = Facts.of(x, gram=True)
    for missing in (replace(facts, gram=None), replace(facts, total_magnitude=None)):
        with pytest.raises(InputError, match="second moment"):
            awq(weight, missing, 0, INT3)
    weight[2, 3] = math.nan
    with pytest.raises(InputError, match="NaN"):
        awq(weight, facts, 0, INT3)
