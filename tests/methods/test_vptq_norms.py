# SPDX-License-Identifier: Apache-2.0
"""VPTQ under scales of rows and columns, against the float64 oracle; what is counted, learned and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.terms import Columns, Dense, Terms, matrices, repack
from fewbit.errors import InputError, SpecError
from fewbit.layouts.dense import DENSE
from fewbit.methods import codebooks, feedback, objective, vptq
from fewbit.methods.norms import Norms
from oracle import norms_oracle
from oracle import vptq_oracle as oracle
from oracle.cases import case

PLAIN: dict[str, Any] = {"rounds": 0, "beam": 1, "restarts": 1, "never_worse": False}
OUTLIERS: dict[str, Any] = {"outliers": 0.2, "outlier_length": 2, "outlier_bits": 4}
NORMS = ("rows", "columns", "both")


def uneven(rows: int, columns: int, seed: int) -> tuple[Tensor, Facts]:
    """A weight whose rows and columns differ much in size, and facts."""
    weight, facts = case(rows, columns, seed)
    sizes = torch.randn(rows + columns, generator=torch.Generator().manual_seed(seed + 100)).exp()
    return weight * sizes[:rows, None] * sizes[rows:], facts


def solved(name: str, weight: Tensor, facts: Facts, **options: Any) -> Terms:
    made = vptq(weight, formats.parse(name), facts, **options)
    assert isinstance(made, Terms)
    return made


def lost(weight: Tensor, made: Tensor, facts: Facts) -> float:
    return float(objective.row_errors(weight - made, facts).sum())


def scales_of(weight: Tensor, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Of rows and columns, as they are stored, from the definition."""
    values = weight.double().numpy()
    rows, columns = np.ones(len(values)), np.ones(values.shape[1])
    if norm != "columns":
        rows = norms_oracle.sizes(values, 1).astype(np.float16).astype(np.float64)
    if norm != "rows":
        columns = norms_oracle.sizes(values / rows[:, None], 0).astype(np.float16).astype(np.float64)
    return rows, columns


def slow(made: Terms) -> list[oracle.Side]:
    """The matrices of ``made``, without its scales."""
    beside = made.terms[0]
    order = beside.permutation.tolist() if isinstance(beside, Columns) else list(range(made.shape[1]))
    sides, first = [], 0
    for one in map(codebooks.Coded.of, matrices(made)):
        own = order[first : first + len(one.indices[0])]
        indices = np.stack([index.T.numpy() for index in one.indices])
        sides.append(oracle.Side(own, [book.double().numpy() for book in one.books], one.width, indices))
        first += len(own)
    return sides


OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vector4x4", {}),
    ("vector2x3+3", {}),
    ("vector4x3/g7", OUTLIERS),
    ("vector4x4", {**OUTLIERS, "outlier_residual_bits": 3}),
    ("vector2x3+3", {**OUTLIERS, "outlier_residual_bits": 3}),
)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_codes_are_those_of_a_sweep_of_the_weight_without_scales(norm: str, name: str, options: dict[str, Any]) -> None:
    """Whose inputs are those of the layer times the scales of the columns, and whose rows count their scale squared."""
    weight, facts = uneven(24, 20, seed=1)
    made = solved(name, weight, facts, norm=norm, **options, **PLAIN)
    rows, columns = scales_of(weight, norm)
    left = weight.double().numpy() / rows[:, None] / columns
    moment, sides = facts.second_moment.double().numpy() * np.outer(columns, columns), slow(made)
    assert bool(options) == (len(sides) == 2)
    if options:  # the columns that count most
        assert sides[0].columns == sorted(np.argsort(-moment.diagonal())[:4].tolist())
    found = oracle.sweep_sides(left, moment, sides, 0.01, rows**2)
    assert all(np.array_equal(ours, side.indices) for ours, side in zip(found, sides, strict=True))
    of_rows, of_columns = (1.0 if s is None else s.double().numpy() for s in (made.row_scale, made.column_scale))
    expected = oracle.decoded_sides(sides) * np.reshape(of_rows, (-1, 1)) * of_columns
    np.testing.assert_allclose(made.dequantize().numpy(), expected, rtol=1e-6, atol=1e-7)


def without_scales(weight: Tensor, facts: Facts, norm: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weight, its damped second moment, and the scales of its rows, float64."""
    rows, columns = scales_of(weight, norm)
    hessian = oracle.damped(facts.second_moment.double().numpy() * np.outer(columns, columns), 0.01)
    return weight.double().numpy() / rows[:, None] / columns, hessian, rows


def begun(
    name: str, weight: Tensor, facts: Facts, norm: str, options: dict[str, Any]
) -> tuple[list[oracle.Side], codebooks.Sides, Tensor, Tensor, feedback.Feedback, Tensor | None]:
    """What the sweeps make: for the oracle, and for us; the weight without scales in the order of its columns, the
    damped second moment, the error feedback, and what rows count."""
    made, scales = solved(name, weight, facts, norm=norm, **options, **PLAIN), Norms.of(weight, norm)
    sides = slow(made)
    order = torch.tensor([k for side in sides for k in side.columns])
    second = scales.facts(facts).second_moment[order][:, order]
    passing = feedback.factorize(second, 0.01, by_activity=True)
    coded = tuple(map(codebooks.Coded.of, matrices(made)))
    return sides, coded, scales.without(weight)[:, order], feedback.damped(second, passing), passing, scales.worth


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("norm", ["rows", "both"])
def test_refitted_books_are_those_of_a_dense_solve(norm: str, name: str, options: dict[str, Any]) -> None:
    weight, facts = uneven(24, 20, seed=3)
    sides, coded, left, moment, _, worth = begun(name, weight, facts, norm, options)
    whole, hessian, rows = without_scales(weight, facts, norm)
    least = oracle.least_squares_sides(whole, hessian, sides, rows**2)
    wanted = left.T.contiguous()
    found = codebooks.refitted(wanted, coded, moment, 1000, worth)
    assert least < 0.97 * codebooks.loss(wanted, coded, moment, worth)
    # rounding to float16 moves each entry by 2^-11
    assert least * 0.999 <= codebooks.loss(wanted, found, moment, worth) <= 1.002 * least


@pytest.mark.parametrize(("name", "options"), OPTIONS[:4])
@pytest.mark.parametrize("norm", ["rows", "both"])
def test_descent_takes_what_loses_least_of_all(norm: str, name: str, options: dict[str, Any]) -> None:
    weight, facts = uneven(16, 15, seed=6)
    sides, before, left, moment, passing, worth = begun(name, weight, facts, norm, options)
    whole, hessian, rows = without_scales(weight, facts, norm)
    expected = oracle.descent_sides(whole, hessian, sides, rows**2)
    assert any(not np.array_equal(now, side.indices) for now, side in zip(expected, sides, strict=True))
    choice = codebooks.Beside(
        [codebooks.Choice(one.books, (len(one.indices[0]), 16), one.width, 32, one, worth) for one in before]
    )
    feedback.descend(left, codebooks.decoded(before).T, moment, passing, choice, 4)
    for one, wanted in zip(choice.coded(), expected, strict=True):
        assert np.array_equal(np.stack([index.T.numpy() for index in one.indices]), wanted)


@pytest.mark.parametrize("norm", NORMS)
def test_scales_are_those_of_least_squares_under_the_codes(norm: str) -> None:
    weight, facts = uneven(24, 20, seed=3)
    made = solved("vector4x4", weight, facts, norm=norm, **PLAIN)
    (dense,) = made.terms
    values, wanted = dense.dequantize().double().numpy(), weight.double().numpy()
    moment, (rows, columns) = facts.second_moment.double().numpy(), scales_of(weight, norm)
    if norm != "columns":
        rows = norms_oracle.best_rows(wanted, values * columns, moment).astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(made.row_scale.double().numpy(), rows, rtol=2.0**-10)  # type: ignore[union-attr]
    if norm != "rows":
        columns = norms_oracle.best_columns(wanted, values * rows[:, None], moment)
        np.testing.assert_allclose(made.column_scale.double().numpy(), columns, rtol=2e-3, atol=2e-3)  # type: ignore[union-attr]
    start = Norms.of(weight, norm).over(matrices(made)[0])
    assert lost(weight, made.dequantize(), facts) < lost(weight, start.dequantize(), facts)


@pytest.mark.parametrize("norm", NORMS)
def test_rows_and_columns_of_uneven_size_lose_less(norm: str) -> None:
    for seed in range(3):
        weight, facts = uneven(96, 40, seed)
        plain = vptq(weight, formats.parse("vector4x5"), facts)
        made = solved("vector4x5", weight, facts, norm=norm)
        assert lost(weight, made.dequantize(), facts) < 0.9 * lost(weight, plain.dequantize(), facts)


@pytest.mark.parametrize("rows", [24, 22])  # 22 rows are no whole vectors of 4
@pytest.mark.parametrize("norm", NORMS)
def test_everything_is_counted(norm: str, rows: int) -> None:
    weight, facts = uneven(rows, 40, seed=2)
    scales = 2 * (rows * (norm != "columns") + 40 * (norm != "rows"))
    for options, order in (({}, 0), (OUTLIERS, 2 * 40), ({**OUTLIERS, "outlier_residual_bits": 3}, 2 * 40)):
        made = repack(solved("vector4x4", weight, facts, norm=norm, rounds=1, **options), lambda format: DENSE)
        assert isinstance(made, Terms)
        assert made.nbytes == scales + order + sum(q.nbytes for q in matrices(made))
        parts = methods.named("vptq").made_of(formats.parse("vector4x4"), (rows, 40), {**options, "norm": norm})
        assert parts.sum and parts.beside == scales + order
        assert [(q.format, q.shape) for q in matrices(made)] == list(parts.matrices)
    for scale in (made.row_scale, made.column_scale):
        assert scale is None or scale.dtype == torch.float16


@pytest.mark.parametrize("norm", NORMS)
def test_zeros_and_extremes_stay_finite(norm: str) -> None:
    weight, facts = case(12, 20, seed=4)
    weight[:, 3], weight[8] = 0, 0
    weight[:4] *= 1e-12
    weight[4:8] *= 1e4
    made = solved("vector4x4", weight, facts, norm=norm)
    assert made.dequantize().isfinite().all()
    start = Norms.of(weight, norm)
    assert start.rows is None or float(start.rows[8]) == 1
    assert start.columns is None or float(start.columns[3]) == 1
    silent = Facts.of(torch.zeros(7, 20), gram=True)
    assert solved("vector4x4", weight, silent, norm=norm).dequantize().isfinite().all()
    none = solved("vector4x4", weight, Facts.none(20, gram=True), norm=norm)
    assert isinstance(none.terms[0], Dense) and none.dequantize().isfinite().all()


def test_refusals() -> None:
    weight, facts = case(8, 16, seed=8)
    for norm in ("yes", "", "row", "Rows"):
        with pytest.raises(SpecError, match="no such scales; norms are none, rows, columns, both"):
            vptq(weight, formats.parse("vector2x4"), facts, norm=norm)
        with pytest.raises(SpecError, match="no such scales"):
            methods.named("vptq").made_of(formats.parse("vector2x4"), (8, 16), {"norm": norm})
    for bad in (float("nan"), float("inf")):
        weight[2, 5] = bad
        with pytest.raises(InputError, match=r"1 entries are NaN or infinite, first weight\[2, 5\]"):
            vptq(weight, formats.parse("vector2x4"), facts, norm="both")


def test_arguments_random_state_and_threads_do_not_matter() -> None:
    weight, facts = uneven(48, 40, seed=12)
    before, state, found = weight.clone(), torch.get_rng_state(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(solved("vector4x5+4/g16", weight, facts, norm="both", rounds=2).dequantize())
    assert torch.equal(found[0], found[1])
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)
