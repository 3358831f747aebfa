# SPDX-License-Identifier: Apache-2.0
"""VPTQ with columns that have a book of their own, against the float64 oracle; what is counted, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.terms import Columns, Dense, Terms, repack
from fewbit.errors import InputError, SpecError
from fewbit.layouts.dense import DENSE
from fewbit.methods import codebooks, feedback, objective, rtn, vptq
from oracle import vptq_oracle as oracle
from oracle.cases import case

PLAIN: dict[str, Any] = {"rounds": 0, "beam": 1, "restarts": 1, "never_worse": False}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("vector4x4", {"outliers": 0.2, "outlier_length": 2, "outlier_bits": 4}),
    ("vector4x3/g7", {"outliers": 0.3, "outlier_length": 2, "outlier_bits": 5}),
    ("vector2x3+3", {"outliers": 0.001, "outlier_length": 4, "outlier_bits": 2}),
    ("vector2x3+2/g8", {"outliers": 0.25, "outlier_length": 6, "outlier_bits": 3}),
)


def solved(name: str, weight: Tensor, facts: Facts, **options: Any) -> Terms:
    made = vptq(weight, formats.parse(name), facts, **options)
    assert isinstance(made, Terms)
    return made


def columns_of(made: Terms) -> Columns:
    (columns,) = made.terms
    assert isinstance(columns, Columns)
    return columns


def coded(made: Terms) -> codebooks.Sides:
    return tuple(codebooks.Coded.of(part.qtensor) for part in columns_of(made).parts if isinstance(part, Dense))


def slow(made: Terms) -> list[oracle.Side]:
    order, sides, first = columns_of(made).permutation.tolist(), [], 0
    for one in coded(made):
        own = order[first : first + len(one.indices[0])]
        indices = np.stack([index.T.numpy() for index in one.indices])
        sides.append(oracle.Side(own, [book.double().numpy() for book in one.books], one.width, indices))
        first += len(own)
    return sides


def lost(weight: Tensor, made: Tensor, facts: Facts) -> float:
    return float(objective.row_errors(weight - made, facts).sum())


def inner(made: Terms, facts: Facts) -> tuple[Tensor, feedback.Feedback, Tensor]:
    """The order of the columns, and in it the error feedback and the damped second moment."""
    order = columns_of(made).permutation.long()
    second = facts.second_moment[order][:, order]
    passing = feedback.factorize(second, 0.01, by_activity=True)
    return order, passing, feedback.damped(second, passing)


@pytest.mark.parametrize("block_size", [7, 128])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_codes_of_both_books_are_those_of_one_sweep(name: str, options: dict[str, Any], block_size: int) -> None:
    for seed in range(3):
        weight, facts = case(24, 20, seed)
        made = solved(name, weight, facts, block_size=block_size, **options, **PLAIN)
        sides = slow(made)
        moment = facts.second_moment.double().numpy()
        found = oracle.sweep_sides(weight.double().numpy(), moment, sides, 0.01)
        assert all(np.array_equal(ours, side.indices) for ours, side in zip(found, sides, strict=True))
        np.testing.assert_allclose(made.dequantize().numpy(), oracle.decoded_sides(sides), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_outliers_are_the_columns_of_the_largest_inputs(name: str, options: dict[str, Any]) -> None:
    weight, facts = case(24, 20, seed=5)
    columns = columns_of(solved(name, weight, facts, **options, **PLAIN))
    count, format = max(1, round(20 * options["outliers"])), formats.parse(name)
    largest = sorted(range(20), key=lambda i: -float(facts.second_moment[i, i]))
    order = columns.permutation.tolist()
    assert order == sorted(largest[:count]) + sorted(largest[count:])
    own = formats.parse(f"vector{options['outlier_length']}x{options['outlier_bits']}")
    found = [(part.qtensor.format, part.shape) for part in columns.parts if isinstance(part, Dense)]
    assert found == [(own, (24, count)), (format, (24, 20 - count))]


def test_the_book_of_outliers_is_of_means_weighted_by_the_diagonal() -> None:
    """So few vectors that k-means sees them all and ends."""
    weight, facts = case(16, 30, seed=1)
    made = solved("vector4x4", weight, facts, outliers=0.3, outlier_length=2, outlier_bits=3, **PLAIN)
    side = slow(made)[0]
    vectors = weight.double().numpy()[:, side.columns].T.reshape(9, 8, 2)
    owner = ((vectors[:, :, None] - side.books[0][0]) ** 2).sum(-1).argmin(-1)
    worth = facts.mean_square.double().numpy()[side.columns]
    for entry in range(8):
        mine = owner == entry
        shares = np.broadcast_to(worth[:, None], owner.shape)[mine]
        mean = (vectors[mine] * shares[:, None]).sum(0) / shares.sum()
        np.testing.assert_allclose(side.books[0][0, entry], mean, rtol=2.0**-10, atol=2e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_refitted_books_are_those_of_a_dense_solve_over_both(name: str, options: dict[str, Any]) -> None:
    weight, facts = case(24, 20, seed=3)
    made = solved(name, weight, facts, **options, **PLAIN)
    order, _, moment = inner(made, facts)
    hessian = oracle.damped(facts.second_moment.double().numpy(), 0.01)
    least = oracle.least_squares_sides(weight.double().numpy(), hessian, slow(made))
    wanted, before = weight[:, order].T.contiguous(), coded(made)
    found = codebooks.refitted(wanted, before, moment, steps=400)
    assert least < 0.97 * codebooks.loss(wanted, before, moment)
    # rounding to float16 moves each entry by 2^-11
    assert least * 0.999 <= codebooks.loss(wanted, found, moment) <= 1.001 * least


@pytest.mark.parametrize(("name", "options"), CASES[:3])
def test_descent_takes_what_loses_least_of_all_on_either_side(name: str, options: dict[str, Any]) -> None:
    weight, facts = case(24, 15, seed=6)
    made = solved(name, weight, facts, **options, **PLAIN)
    order, passing, moment = inner(made, facts)
    hessian = oracle.damped(facts.second_moment.double().numpy(), 0.01)
    expected = oracle.descent_sides(weight.double().numpy(), hessian, slow(made))
    before = coded(made)
    assert any(not np.array_equal(now, side.indices) for now, side in zip(expected, slow(made), strict=True))
    for batch in (4, 128):
        choice = codebooks.Beside(
            [codebooks.Choice(one.books, (len(one.indices[0]), 24), one.width, 32, one) for one in before]
        )
        feedback.descend(weight[:, order], codebooks.decoded(before).T, moment, passing, choice, batch)
        for one, wanted in zip(choice.coded(), expected, strict=True):
            assert np.array_equal(np.stack([index.T.numpy() for index in one.indices]), wanted)


@pytest.mark.parametrize("rows", [24, 22])  # 22 rows are no whole vectors of 4, 6 or 12
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_step_lowers_the_loss_and_none_ends_above_rounding(name: str, options: dict[str, Any], rows: int) -> None:
    weight, facts = case(rows, 24, seed=7)
    found = [solved(name, weight, facts, rounds=rounds, **options) for rounds in (0, 1, 8)]
    losses = [lost(weight, made.dequantize(), facts) for made in found]
    assert losses[0] > losses[1] > losses[2]
    order, plain, first = columns_of(found[0]).permutation.long(), torch.empty_like(weight), 0
    for part in columns_of(found[0]).parts:
        assert isinstance(part, Dense)
        own = order[first : first + part.shape[1]]
        plain[:, own] = rtn(weight[:, own], part.qtensor.format).dequantize()
        first += part.shape[1]
    assert losses[0] < lost(weight, plain, facts)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_everything_is_counted(name: str, options: dict[str, Any]) -> None:
    weight, facts = case(26, 40, seed=2)
    made = repack(solved(name, weight, facts, rounds=1, **options), lambda format: DENSE)
    count = max(1, round(40 * options["outliers"]))
    expected = 2 * 40
    for format, columns in (
        (formats.parse(f"vector{options['outlier_length']}x{options['outlier_bits']}"), count),
        (formats.parse(name), 40 - count),
    ):
        books = 16 * format.length * sum(1 << bits for bits in format.fields.values())  # type: ignore[attr-defined]
        expected += -(-26 // format.height) * -(-format.bits * columns // 8)
        expected += books // 8 * -(-columns // (format.block or columns))
    assert made.nbytes == expected
    parts = methods.named("vptq").made_of(formats.parse(name), (26, 40), options)
    assert parts.sum and parts.beside == 80
    assert [(part.qtensor.format, part.shape) for part in columns_of(made).parts] == list(parts.matrices)  # type: ignore[attr-defined]
    assert not methods.named("vptq").made_of(formats.parse(name), (26, 40), {}).sum


def test_where_rounding_loses_less_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, facts = case(16, 20, seed=2)
    options = {"outliers": 0.2, "outlier_bits": 4}
    good = coded(solved("vector4x4", weight, facts, rounds=0, **options))

    def zeros(weight: Tensor, passing: object, choice: codebooks.Beside, batch: int) -> None:
        for column in range(weight.shape[1]):
            choice(column, torch.zeros(len(weight)))

    monkeypatch.setattr(feedback, "sweep", zeros)
    kept = solved("vector4x4", weight, facts, rounds=0, **options)
    order, first = columns_of(kept).permutation.long(), 0
    for one, now in zip(good, coded(kept), strict=True):
        own = weight[:, order[first : first + len(one.indices[0])]]
        points = own.T.reshape(own.shape[1], -1, one.books[0].shape[2])
        plain = codebooks.all_nearest(points, one.books, one.width, 8)
        assert torch.equal(plain.indices[0], now.indices[0])
        first += own.shape[1]


def test_no_token() -> None:
    weight, format = case(12, 20, seed=4)[0], formats.parse("vector4x4")
    made = solved("vector4x4", weight, Facts.none(20, gram=True), outliers=0.2, outlier_bits=4)
    assert columns_of(made).permutation.tolist() == list(range(20))
    beside = [rtn(weight[:, :4], formats.parse("vector2x4")), rtn(weight[:, 4:], format)]
    assert torch.equal(made.dequantize(), torch.cat([part.dequantize() for part in beside], 1))


def test_refusals() -> None:
    weight, facts = case(8, 16, seed=8)
    format = formats.parse("vector2x4")
    for share in (-0.1, 1, 1.5, True, "0.1", float("nan")):
        with pytest.raises(SpecError, match="a share of the columns below 1"):
            vptq(weight, format, facts, outliers=share)  # type: ignore[arg-type]
    for options in ({"outlier_length": 3}, {"outlier_length": 0}, {"outlier_bits": 17}, {"outlier_bits": 0}):
        with pytest.raises(SpecError, match=r"weights are 2, 4.*bits 1 to 16"):
            vptq(weight, format, facts, outliers=0.2, **options)
    for options in ({"outlier_length": 2.0}, {"outlier_bits": "6"}, {"outlier_bits": True}):
        with pytest.raises(SpecError, match="no whole number"):
            vptq(weight, format, facts, outliers=0.2, **options)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"16 entries for the 12 vectors of 3 columns.*outlier_bits=3 or less"):
        vptq(weight, format, facts, outliers=0.2, outlier_bits=4)
    with pytest.raises(InputError, match="no second moment"):
        vptq(weight, format, Facts.of(torch.ones(3, 16)), outliers=0.2, outlier_bits=3)
    assert not isinstance(vptq(weight[:, :1], format, case(1, 1, seed=0)[1], outliers=0.5), Terms), "one column is all"


def test_arguments_random_state_and_threads_do_not_matter() -> None:
    weight, facts = case(48, 40, seed=12)
    before, state = (weight.clone(), facts.gram.clone()), torch.get_rng_state()  # type: ignore[union-attr]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        options = {"outliers": 0.2, "outlier_bits": 5, "rounds": 2}
        found.append(solved("vector4x5+4/g16", weight, facts, **options).dequantize())
    assert torch.equal(found[0], found[1])
    assert torch.equal(weight, before[0]) and torch.equal(facts.gram, before[1])  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
