# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant's scales against the paper's formula, and the channels that it does not speak of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.errors import InputError
from fewbit.transforms import smooth

HALF = 2.0**-11
"""Relative rounding error of float16."""


def divisors(weight: Tensor, x: Tensor, alpha: float) -> list[float]:
    """s of every channel, from the paper's definition, one at a time in float64."""
    found = []
    for j in range(weight.shape[1]):
        largest = max(abs(float(value)) for value in x[:, j])
        heaviest = max(abs(float(value)) for value in weight[:, j])
        found.append(largest**alpha / heaviest ** (1 - alpha))
    return found


def sample(columns: int = 33) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, columns, generator=generator) * torch.logspace(-2, 2, columns)
    return torch.randn(7, columns, generator=generator) * 0.05, x


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_the_formula(alpha: float) -> None:
    weight, x = sample()
    stored = smooth(weight, Facts.of(x), alpha=alpha).scale
    assert stored.dtype == torch.float16
    for found, s in zip(stored.tolist(), divisors(weight, x, alpha), strict=True):
        assert abs(found * s - 1) <= HALF + 2.0**-20


def test_half_makes_input_and_weight_equally_wide() -> None:
    """For alpha = 0.5, max|x'| = max|w'| = sqrt(max|x| max|w|) in every channel."""
    weight, x = sample()
    scale = smooth(weight, Facts.of(x))
    wide = (x.abs().amax(0) * weight.abs().amax(0)).sqrt()
    assert torch.allclose(scale.apply(x).abs().amax(0), wide, rtol=2 * HALF)
    assert torch.allclose(scale.weight(weight).abs().amax(0), wide, rtol=2 * HALF)


def test_channels_that_were_always_zero_are_left_alone() -> None:
    weight, x = sample()
    x[:, [0, 5]] = 0
    scale = smooth(weight, Facts.of(x)).scale
    assert scale[[0, 5]].tolist() == [1, 1] and int((scale == 1).sum()) == 2


def test_a_zero_column_divides_by_the_least_weight() -> None:
    weight, x = sample()
    weight[:, 4] = 0
    scale = smooth(weight, Facts.of(x))
    expected = math.sqrt(1e-5) / math.sqrt(float(x[:, 4].abs().max()))
    assert abs(float(scale.scale[4]) / expected - 1) <= 2 * HALF
    assert bool(scale.weight(weight)[:, 4].eq(0).all())


@pytest.mark.parametrize(("largest", "expected"), [(1e30, 2.0**-14), (1e-30, 2.0**14)])
def test_extremes_stay_normal_numbers_of_float16(largest: float, expected: float) -> None:
    weight, x = sample()
    x[:, 3] = largest
    scale = smooth(weight, Facts.of(x), alpha=1.0)
    assert float(scale.scale[3]) == expected
    assert bool(scale.apply(x).isfinite().all()) and bool(scale.weight(weight).isfinite().all())


def test_without_a_token_nothing_is_scaled() -> None:
    weight, _ = sample()
    assert bool(smooth(weight, Facts.none(33)).scale.eq(1).all())


def test_what_it_cannot_use_is_refused() -> None:
    weight, x = sample()
    with pytest.raises(InputError, match="before inputs are rotated"):
        smooth(weight, replace(Facts.of(x), largest=None))
    with pytest.raises(InputError, match=r"max\|x\|"):
        smooth(weight[:, :5], Facts.of(x))
    weight[2, 3] = math.nan
    with pytest.raises(InputError, match="NaN"):
        smooth(weight, Facts.of(x))
