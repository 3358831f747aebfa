# SPDX-License-Identifier: Apache-2.0
"""Fits against slow searches and definitions in float64, with importance and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit import formats
from fewbit.core import blocks as B
from fewbit.core import format as F

HALF = 2.0**-11
"""Relative rounding error of float16."""


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ternary_error(weight: np.ndarray, share: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """For each of ``scale`` (n,)."""
    scale = scale[:, None]
    trit = np.clip(np.rint(weight / scale), -1, 1)
    return (share * (weight - scale * trit) ** 2).sum(1)


@pytest.mark.parametrize("seed", range(8))
def test_ternary_scale_is_the_best_of_a_fine_search(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(4, 24).astype(np.float32)
    share = generator.uniform(0, 3, 24).astype(np.float32) * (generator.random(24) > 0.2)
    params = F.fit(formats.parse("ternary/g32"), torch.tensor(weight[None]), torch.tensor(share))
    weight = weight.astype(np.float64)
    ours = ternary_error(weight, share, params["scale"].double().numpy().reshape(1))[0]
    best = ternary_error(weight, share, np.linspace(0.01, np.abs(weight).max() * 1.2, 20000)).min()
    # rounding the scale to float16 moves the error by at most sum h s^2 HALF^2, the error being flat at its minimum
    assert ours <= best + share.sum() * float(params["scale"]) ** 2 * HALF**2


def test_sign_scale_is_the_weighted_mean() -> None:
    weight, share = normal(3, 40), torch.rand(40, generator=torch.Generator().manual_seed(1))
    scale = F.fit(formats.parse("sign/channel"), weight, share)["scale"].double().squeeze()
    mean = (weight.double().abs() * share.double()).sum(1) / share.double().sum()
    assert torch.allclose(scale, mean, rtol=HALF, atol=0)


@pytest.mark.parametrize("name", ["sign/g32", "ternary/g32", "int1/g32/sym"])
def test_unseen_inputs_count_alike(name: str) -> None:
    """A block without any importance is fitted as if all its inputs mattered, not collapsed to zero."""
    weight, share = normal(2, 64), torch.ones(64)
    share[:32] = 0
    format = formats.parse(name)
    assert torch.equal(F.fit(format, weight, share)["scale"], F.fit(format, weight)["scale"])


@pytest.mark.parametrize("name", formats.EXAMPLES)
def test_padding_moves_no_parameter(name: str) -> None:
    """A last block of 3 columns has the parameters of a row of those 3 columns alone, offset far from zero or not."""
    format = formats.parse(name)
    if format.block == 0:
        pytest.skip("a whole row has no padding")
    for weight in (normal(4, 3), normal(4, 3) + 9):
        format = format.bind(weight)
        mask, height = B.present(3, format.block).expand(4, -1, -1), format.height
        padded = format.fit(B.fold(B.split(weight, format.block), height), B.fold(mask, height))
        alone = format.fit(B.fold(weight.unsqueeze(1), height), torch.ones(4 // height, 1, 3 * height))
        for key in padded:
            assert torch.equal(padded[key], alone[key]), key


@pytest.mark.parametrize("name", formats.EXAMPLES)
def test_importance_scale_does_not_matter(name: str) -> None:
    weight, share = normal(4, 200), torch.rand(200, generator=torch.Generator().manual_seed(3)) + 0.01
    format = formats.parse(name).bind(weight)
    usual = F.fit(format, weight, share)
    for factor in (2.0**-100, 2.0**100):
        for key, value in F.fit(format, weight, share * factor).items():
            assert torch.equal(value, usual[key]), (key, factor)


def test_affine_covers_both_ends() -> None:
    """Within the range no value is off by more than half a step, plus what float16 scales and zero points cost."""
    weight = normal(16, 256)
    for name in ("int3/g64/asym", "int4/g64/sym", "int8/g64/asym", "int4/g32/min"):
        format = formats.parse(name)
        params = F.fit(format, weight)
        scale = B.join(params["scale"].float().expand(-1, -1, format.block), 256)
        error = (F.decode(format, F.encode(format, weight, params), params) - weight).abs()
        # asymmetric: the zero point moves the grid by up to half a step, and one end then falls half a step outside
        assert bool((error <= scale * (1 if "asym" in name else 0.5 + 0.01)).all()), name


def test_superblock_scales_follow_the_blocks() -> None:
    """Each block's scale is within half a unit, a 126th of the span's largest, of what the block alone would get."""
    weight = normal(4, 512) * torch.logspace(-1, 1, 16).repeat_interleave(32)
    format = formats.parse("int4/g32x8/asym/s6")
    params = F.fit(format, weight)
    scale = params["super_scale"].double() * params["scale_code"].double()
    alone = F.fit(formats.parse("int4/g32/asym"), weight)["scale"].double()
    unit = params["super_scale"].double()
    minimum = params["super_minimum"].double()
    slack = 0.5 * unit + minimum / 2 / 15 + alone * HALF * 2  # the minimum's own rounding widens the range
    tiny = params["scale_code"] == 1  # a block that needs less than half a unit is given one
    assert bool(((scale - alone).abs() <= slack + 0.5 * unit * tiny).all())
    assert int(params["scale_code"].min()) >= 1
    spans = params["super_scale"].reshape(4, 2, 8)
    assert torch.equal(spans, spans[..., :1].expand(-1, -1, 8))


def test_short_last_span() -> None:
    """Rows of 9 blocks of 32: the ninth is a span of its own."""
    weight = normal(3, 9 * 32)
    format = formats.parse("int4/g32x8/asym/s6")
    whole = F.fit(format, weight)
    last = F.fit(format, weight[:, 256:])
    for key in whole:
        assert torch.equal(whole[key][:, 8:], last[key]), key


def test_far_from_zero_minimum_beats_zero_point() -> None:
    weight = normal(4, 64) * 0.01 + 1
    errors = {}
    for name in ("int4/g32/min", "int4/g32/asym"):
        format = formats.parse(name)
        params = F.fit(format, weight)
        errors[name] = (F.decode(format, F.encode(format, weight, params), params) - weight).abs().max()
    assert errors["int4/g32/min"] < 0.003 < errors["int4/g32/asym"]


@pytest.mark.parametrize("name", ["sign/g128", "ternary/g128"])
def test_rows_fitted_in_parts_are_fitted_alike(name: str) -> None:
    """More than 2^20 entries are handled some rows at a time, with importance for all rows or for each."""
    format, weight = formats.parse(name), normal(1100, 1024)
    share = torch.rand(1024, generator=torch.Generator().manual_seed(4))
    whole = F.fit(format, weight, share)["scale"]
    assert torch.equal(whole, F.fit(format, weight, share.expand(1100, 1024))["scale"])
    assert torch.equal(whole[1090:], F.fit(format, weight[1090:], share)["scale"])
