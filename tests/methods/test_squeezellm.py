# SPDX-License-Identifier: Apache-2.0
"""Sensitive k-means and SqueezeLLM against the slow definition: what is kept apart, and what the levels cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, layouts, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.core.rewrite import Rotation, Scale
from fewbit.core.terms import Dense, Sparse, Terms
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.methods.squeezellm import largest
from oracle import squeezellm_oracle as oracle

SHARES: dict[str, Any] = {"outliers": 0.02, "sensitive": 0.01}


def case(rows: int = 6, columns: int = 40, seed: int = 0) -> tuple[Tensor, Facts]:
    """A heavy-tailed weight, and facts with a Fisher diagonal that spans orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight * (1 + 4 * (torch.rand(rows, columns, generator=generator) < 0.05))
    fisher = (3 * torch.randn(rows, columns, generator=generator)).exp() * 1e-9
    return weight, replace(Facts.of(torch.randn(9, columns, generator=generator)), fisher=fisher)


def cost(weight: Tensor, result: QTensor, fisher: Tensor) -> float:
    return float((fisher.double() * (weight.double() - result.dequantize().double()).square()).sum())


def rounded(weight: Tensor, fisher: Tensor, least: float) -> float:
    """The most that the optimum ``least`` may grow to by levels in float16, each off by 2^-11 of it at most: the
    square root of a sum of squares is a norm."""
    off = float((fisher.double() * (weight.double() * 2.0**-11).square()).sum())
    return (least**0.5 + (2 * off) ** 0.5) ** 2


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_cost_what_the_best_cost(bits: int) -> None:
    weight, facts = case()
    assert facts.fisher is not None
    result = methods.skm(weight, formats.parse(f"palette{bits}/row"), facts)
    kept = np.zeros(weight.shape, bool)
    least = oracle.objective(weight.double().numpy(), facts.fisher.double().numpy(), 1 << bits, kept)
    found, plain = cost(weight, result, facts.fisher), methods.rtn(weight, formats.parse(f"palette{bits}/row"))
    assert least * (1 - 1e-6) <= found <= rounded(weight, facts.fisher, least)
    assert found < 0.7 * cost(weight, plain, facts.fisher)


def test_vectors_weigh_as_much_as_their_weights_on_average() -> None:
    """Lloyd's iterations end where each vector of the book is the weighted mean of what is nearest to it."""
    weight, facts = case(rows=32, columns=64)
    assert facts.fisher is not None
    fisher = facts.fisher.clamp(1e-10, 1e-7)
    result = methods.skm(weight, formats.parse("vector4x4"), replace(facts, fisher=fisher))
    points = weight.double().reshape(8, 4, 64).transpose(1, 2).reshape(-1, 4).numpy()
    share = fisher.double().reshape(8, 4, 64).mean(1).reshape(-1).numpy()
    codes, params = result.logical()
    book = params["codebook"][0, 0, 0].double().numpy()
    distance = ((points[:, None] - book) ** 2).sum(-1)
    assert np.array_equal(codes.reshape(-1).numpy(), distance.argmin(1))
    for entry in np.unique(codes.numpy()):
        own = codes.reshape(-1).numpy() == entry
        np.testing.assert_allclose(book[entry], np.average(points[own], 0, share[own]), rtol=2e-3, atol=2e-3)
    assert cost(weight, result, fisher) < cost(weight, methods.rtn(weight, formats.parse("vector4x4")), fisher)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_kept_apart_and_what_the_levels_cost_without_it(seed: int) -> None:
    weight, facts = case(seed=seed)
    assert facts.fisher is not None
    result = methods.squeezellm(weight, formats.parse("palette2/row"), facts, **SHARES)
    assert isinstance(result, Terms)
    dense, sparse = result.terms
    assert isinstance(dense, Dense) and isinstance(sparse, Sparse)
    kept = oracle.outliers(weight.numpy(), SHARES["outliers"])
    others = np.where(kept, -1, facts.fisher.numpy())
    for place in np.argsort(-others, axis=None)[: round(SHARES["sensitive"] * others.size)]:
        kept.flat[place] = True
    assert kept.sum() == 5 + 2
    found = torch.zeros(weight.shape, dtype=torch.bool)
    found[sparse.rows(), sparse.columns.long()] = True
    assert np.array_equal(found.numpy(), kept)
    counted = facts.fisher.masked_fill(found, 0.0)
    least = oracle.objective(weight.double().numpy(), facts.fisher.double().numpy(), 4, kept)
    assert least * (1 - 1e-6) <= cost(weight, dense.qtensor, counted) <= rounded(weight, counted, least)
    left = (weight - dense.dequantize()).abs()
    assert bool(((result.dequantize() - weight).abs()[found] <= 2.0**-10 * left[found]).all())


def test_true_bits_count_values_columns_and_row_pointers() -> None:
    weight, facts = case(64, 256)
    format, layout = formats.parse("palette3/row"), layouts.named("dense")
    result = methods.squeezellm(weight, format, facts, **SHARES)
    assert isinstance(result, Terms) and isinstance(result.terms[0], Dense)
    entries = round(0.02 * 64 * 256) + round(0.01 * 64 * 256)
    matrix = result.terms[0].qtensor.repack(layout)
    assert matrix.nbytes == 64 * (256 * 3 // 8 + 8 * 2)
    assert result.terms[1].nbytes == 4 * entries + 4 * (64 + 1)
    row = methods.named("squeezellm")
    assert row.beside((64, 256), **SHARES) == result.terms[1].nbytes
    assert row.beside((64, 256), outliers=0, sensitive=0) == methods.named("gptq").beside((64, 256)) == 0


@pytest.mark.parametrize("name", ["palette3", "palette2/rows4", "palette4/row/g16"])
def test_without_anything_apart_it_is_sensitive_k_means(name: str) -> None:
    weight, facts = case()
    bare = methods.squeezellm(weight, formats.parse(name), facts, outliers=0, sensitive=0)
    assert isinstance(bare, QTensor)
    assert torch.equal(bare.dequantize(), methods.skm(weight, formats.parse(name), facts).dequantize())
    alike = replace(facts, fisher=torch.full_like(weight, 3e-20))
    plain = methods.rtn(weight, formats.parse(name))
    assert torch.equal(methods.skm(weight, formats.parse(name), alike).dequantize(), plain.dequantize())
    unseen = methods.skm(weight, formats.parse(name), Facts.none(weight.shape[1]))
    assert torch.equal(unseen.dequantize(), plain.dequantize())


def test_equal_values_are_kept_in_their_order() -> None:
    mask = largest(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 0.0]]), 3)
    assert mask.tolist() == [[False, True, True], [True, False, False]]


def test_a_fisher_diagonal_goes_through_scales_and_adds_up() -> None:
    weight, facts = case()
    scale = Scale(torch.logspace(-1, 1, weight.shape[1]).half())
    # W' = W / s works on x' = s x: the loss stays what it is, and its gradient becomes dL/dW' = s dL/dW.
    w = weight.double().requires_grad_()
    x = torch.randn(weight.shape[1], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((w @ x).sin().sum(), w)
    moved = (weight.double() / scale.scale.double()).requires_grad_()
    (other,) = torch.autograd.grad((moved @ (x * scale.scale.double())).sin().sum(), moved)
    got = scale.facts(replace(facts, fisher=gradient.square().float())).fisher
    assert got is not None and torch.allclose(got.double(), other.square(), rtol=1e-5)
    both = facts.merge(facts).fisher
    assert both is not None and facts.fisher is not None and torch.equal(both, 2 * facts.fisher)
    assert facts.merge(replace(facts, fisher=None)).fisher is None
    rotated = Rotation.random(weight.shape[1], 0).facts(Facts.of(torch.ones(3, weight.shape[1]), gram=True))
    assert rotated.fisher is None


def test_what_cannot_be_done_is_refused() -> None:
    weight, facts = case()
    with pytest.raises(InputError, match="hold none"):
        methods.skm(weight, formats.parse("palette3"), replace(facts, fisher=None))
    with pytest.raises(InputError, match="negative or NaN"):
        methods.skm(weight, formats.parse("palette3"), replace(facts, fisher=torch.full_like(weight, float("nan"))))
    with pytest.raises(InputError, match=r"of shape \(6, 40\)"):
        methods.squeezellm(weight[:5], formats.parse("palette3"), facts)
    with pytest.raises(UnsupportedError, match="not clustered"):
        methods.skm(weight, formats.parse("int3/g32"), facts)
    for share in (-0.1, 0.2, True, "few"):
        with pytest.raises(SpecError, match="a share of the entries"):
            methods.squeezellm(weight, formats.parse("palette3"), facts, outliers=share)  # type: ignore[arg-type]
