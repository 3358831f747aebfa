# SPDX-License-Identifier: Apache-2.0
"""Methods of about one bit against float64 definitions, and what is known of where they end."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, layouts, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import storage, storage_bytes
from fewbit.core.terms import Columns, Product, Terms, repack
from fewbit.errors import InputError, SpecError
from fewbit.methods.nanoquant import CLIP, PENALTY, POWER, REGULAR, SHRINK, Factors, preconditioners, rank
from oracle import signs_oracle as oracle

HALF = 2.0**-11
"""Relative rounding error of float16."""


def case(rows: int = 6, columns: int = 40, seed: int = 0) -> tuple[Tensor, Facts]:
    """A weight whose rows differ in size, and facts of inputs that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-0.5, 0.5, rows)[:, None]
    mixed = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mixed * torch.logspace(-1, 1, columns)
    fisher = torch.rand(rows, columns, generator=generator) * torch.logspace(-1, 1, rows)[:, None]
    return weight, replace(Facts.of(x, gram=True), fisher=fisher)


def dense_bytes(result: Terms) -> int:
    return repack(result, lambda format: layouts.named("dense")).nbytes


# PTQ1.61


@pytest.mark.parametrize("share", [0.2, 0.5, 0.0])
def test_ptq161_is_its_definition(share: float) -> None:
    weight, facts = case()
    assert facts.largest is not None
    result = methods.ptq161(weight, formats.parse("int1/channel/min"), facts, salient=share)
    expected = oracle.ptq161(weight.double().numpy(), facts.largest.numpy(), share, 4)
    found, wanted, w = result.dequantize().double(), torch.from_numpy(expected), weight.double()
    off = 20 * HALF * w.abs().amax(1, keepdim=True)  # scale and minimum in float16, the scale up to 15 times
    assert bool(((found - w).abs() <= (wanted - w).abs() + off).all())
    assert int(((found - wanted).abs() > off).sum()) <= 3, "few lie between two levels"


def test_ptq161_counts_everything() -> None:
    weight, facts = case(64, 160)
    result = methods.ptq161(weight, formats.parse("int1/channel/min"), facts)
    signs, four = 64 * 128 // 8, 64 * 32 // 2
    assert dense_bytes(result) == signs + four + 2 * (4 * 64) + 2 * 160 + 2 * 128
    assert isinstance(result, Terms) and isinstance(result.terms[0], Columns)
    assert [part.shape for part in result.terms[0].parts] == [(64, 32), (64, 128)]


def test_ptq161_s_name_leaves_scales_out() -> None:
    """Of 4096 x 4096 weights: 0.8 x 1 + 0.2 x 4 bits of codes, a mask, and what scales take, near 0.02."""
    made = methods.named("ptq161").made_of(formats.parse("int1/channel/min"), (4096, 4096), {})
    dense = layouts.named("dense")
    held = made.beside + sum(storage_bytes(storage(format, dense, shape)) for format, shape in made.matrices)
    assert 8 * held / 4096**2 == pytest.approx(1.6 + 0.0002 + 0.023, abs=0.002)


# BiLLM


@pytest.mark.parametrize(("columns", "salient"), [(40, 0.4), (36, 0.0), (33, 0.2)])
def test_billm_is_its_definition(columns: int, salient: float) -> None:
    weight, facts = case(5, columns, seed=columns)
    result = methods.billm(weight, formats.parse("sign/g16"), facts, salient=salient)
    blocks = max(1, round(salient * columns / 16)) if salient else 0
    found, plain = result.dequantize().double(), methods.billm(weight, formats.parse("sign/g16"), Facts.none(columns))
    moment = facts.second_moment.double().numpy()
    expected = torch.from_numpy(oracle.billm(weight.double().numpy(), moment, 16, blocks, 0.01, 9))
    error = methods.relative_error
    assert error(weight, found.float(), facts) < error(weight, plain.dequantize(), facts)
    off = (found - expected).abs().amax(1) > 1e-2 * weight.abs().amax(1)
    # rows that are better without error feedback go without
    assert int(off.sum()) <= 1
    assert error(weight[~off], found[~off].float(), facts) == pytest.approx(
        error(weight[~off], expected[~off].float(), facts), rel=1e-2
    )


def test_two_sign_matrices_are_both_of_billm_s_kinds() -> None:
    """Without a token: the values of a block are the four that residuals, or groups, have."""
    weight, _ = case(4, 48)
    result = methods.billm(weight, formats.parse("sign/g16"), Facts.none(48), salient=0.3)
    assert isinstance(result.terms[0], Columns)
    order, values = result.terms[0].permutation.long(), result.dequantize()
    assert len(set(order[:16].tolist())) == 16
    for block, row in itertools.product(range(3), range(4)):
        at = order[16 * block : 16 * block + 16]
        w = weight[row, at].double().numpy()
        a, b = oracle.residual(w) if block == 0 else oracle.split(w, 9)
        levels = np.array([a + b, a - b] if block == 0 else [a, b])
        expected = np.array([np.sign(one) * levels[np.abs(abs(one) - levels).argmin()] for one in w])
        np.testing.assert_allclose(values[row, at].numpy(), expected, atol=4 * HALF * float(np.abs(w).max()))
    assert dense_bytes(result) == 2 * (4 * 48 // 8 + 2 * 4 * 3) + 2 * 48


# ARB-RC


@pytest.mark.parametrize("weighted", [False, True])
def test_arb_ends_at_the_leading_singular_pair(weighted: bool) -> None:
    weight, facts = case(12, 30)
    worth = facts.mean_square.double() if weighted else torch.ones(30, dtype=torch.float64)
    known = facts if weighted else Facts.none(30)
    result = methods.arb(weight, formats.parse("sign/channel"), known, iterations=60).dequantize().double()
    left, values, right = np.linalg.svd((weight.double().abs() * worth.sqrt()).numpy())
    best = torch.from_numpy(values[0] * np.outer(left[:, 0], right[0])) / worth.sqrt() * weight.sign()
    assert float((result - best).abs().max()) <= 4 * HALF * float(best.abs().max())


def test_arb_loses_less_with_every_iteration_and_starts_from_one_scale() -> None:
    weight, facts = case(12, 30)
    format = formats.parse("sign/g10")
    errors = [
        methods.relative_error(
            weight, methods.arb(weight, format, facts, iterations=n).dequantize(), replace(facts, gram=None)
        )
        for n in (1, 2, 15)
    ]
    plain = methods.relative_error(weight, methods.rtn(weight, format), replace(facts, gram=None))
    assert errors[2] <= errors[1] + HALF and errors[1] <= errors[0] + HALF and errors[0] < plain


# NanoQuant


def planted(rows: int, columns: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)

    def signs(*shape: int) -> Tensor:
        return torch.where(torch.rand(*shape, generator=generator) > 0.5, 1.0, -1.0)

    p, q = (torch.rand(n, generator=generator) + 0.5 for n in (rows, columns))
    middle = torch.logspace(0.3, -0.3, rank)
    return (signs(rows, rank) * p[:, None] * middle) @ (signs(rank, columns) * q)


def test_nanoquant_finds_a_product_of_signs() -> None:
    """A matrix that is one comes back, but for the rounding of scales to float16."""
    weight = planted(48, 40, 8)
    bits = (8 * (48 + 40 + 16) + 16 * (48 + 40)) / (48 * 40)
    result = methods.nanoquant(weight, formats.parse("sign/channel"), Facts.none(40), bits=bits)
    assert isinstance(result.terms[0], Product) and result.terms[0].left.shape == (48, 8)
    assert methods.relative_error(weight, result.dequantize()) < 4 * HALF


def test_nanoquant_starts_from_admm_as_defined() -> None:
    weight, _ = case(10, 14)
    found = Factors.start(weight, 6, 5)
    first, last = PENALTY
    expected = oracle.admm(
        weight.double().numpy(), 6, 5, lambda step: first + (last - first) * step / 4, REGULAR, POWER
    )
    np.testing.assert_allclose(found.product().numpy(), expected, atol=1e-4 * np.abs(expected).max())


def test_nanoquant_s_rounds_never_lose_and_end_where_no_single_change_helps() -> None:
    weight, _ = case(6, 9)
    factors = Factors.start(weight, 4, 3)
    errors = [factors.error()]
    for _ in range(40):
        factors.improve()
        errors.append(factors.error())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    for signs in (factors.u, factors.v):
        for index in np.ndindex(*signs.shape):
            signs[index] *= -1
            assert factors.error() >= errors[-1] * (1 - 1e-5)
            signs[index] *= -1
    for scale in (factors.p, factors.q, factors.middle):
        for index in range(len(scale)):
            kept = float(scale[index])
            for factor in (0.99, 1.01):
                scale[index] = kept * factor
                assert factors.error() >= errors[-1] * (1 - 1e-5)
            scale[index] = kept


def test_nanoquant_of_one_huge_column_ends_in_numbers() -> None:
    """More ranks than the matrix has, most of which find next to nothing to stand for."""
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).index_fill(1, torch.tensor([3]), 1e4)
    result = methods.nanoquant(weight, formats.parse("sign/channel"), Facts.none(40))
    assert methods.relative_error(weight, result.dequantize()) < 1e-2


def test_nanoquant_minds_what_matters() -> None:
    """The error weighted by E[x^2] and the Fisher diagonal's rows is less than that of factors that know neither."""
    weight, facts = case(24, 40)
    format = formats.parse("sign/channel")
    out, into = preconditioners(facts, 24)
    aware, blind = (
        (out[:, None] * (weight - methods.nanoquant(weight, format, known, bits=2.0).dequantize()) * into).norm()
        for known in (facts, Facts.none(40))
    )
    assert float(aware) < 0.95 * float(blind)


@pytest.mark.parametrize("bits", [0.3, 1.0, 2.0, 3.0])
def test_nanoquant_takes_the_bits_that_it_was_given(bits: float) -> None:
    weight, _ = case(64, 96)
    result = methods.nanoquant(weight, formats.parse("sign/channel"), Facts.none(96), bits=bits, iterations=2, rounds=1)
    inner, stored = rank(64, 96, bits), dense_bytes(result)
    assert stored == 64 * inner // 8 + inner * 96 // 8 + 2 * (64 + inner + 96)
    if bits > 0.3:  # of which eight ranks take more
        assert 0.75 * bits <= 8 * stored / (64 * 96) <= bits
    else:
        assert inner == 8


def test_options_and_facts_out_of_range_are_refused() -> None:
    weight, facts = case()
    two, one = formats.parse("int1/channel/min"), formats.parse("sign/channel")
    with pytest.raises(SpecError, match="a share of the columns"):
        methods.ptq161(weight, two, facts, salient=1.5)
    with pytest.raises(SpecError, match="2 to 8"):
        methods.ptq161(weight, two, facts, salient_bits=1)
    with pytest.raises(InputError, match="rotated"):
        methods.ptq161(weight, two, replace(facts, largest=None))
    with pytest.raises(InputError, match="no second moment"):
        methods.billm(weight, one, replace(facts, gram=None))
    with pytest.raises(SpecError, match="more than 0"):
        methods.nanoquant(weight, one, facts, bits=0)
    with pytest.raises(SpecError, match="positive"):
        methods.arb(weight, one, facts, iterations=0)


def test_nanoquant_weighs_outputs_by_the_gradients_that_were_seen_at_them() -> None:
    """Their square roots at a mean square of 1, cut and drawn in; the Fisher diagonal is not asked."""
    one = torch.Generator().manual_seed(4)
    squares, facts = torch.rand(24, generator=one) + 0.1, Facts.of(torch.randn(50, 16, generator=one))
    seen = replace(facts, output_square=squares, fisher=torch.rand(24, 16, generator=one))
    worth = squares.double() / squares.double().mean()
    worth = (1 - SHRINK) * worth.clamp_max(float(worth.quantile(CLIP))) + SHRINK
    torch.testing.assert_close(preconditioners(seen, 24)[0], worth.sqrt())
    assert torch.equal(preconditioners(replace(seen, output_square=None), 24)[0], torch.ones(24, dtype=torch.float64))
