# SPDX-License-Identifier: Apache-2.0
"""What sums of terms learn: what they decode to, the gradient of every stored number, that codes stay, and that those
of vectors move as they would alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Terms, matrices
from fewbit.methods.scales import Scales
from fewbit.methods.sums import SHARE, Sum, chosen, learned
from fewbit.methods.vectors import Vectors

ROWS, COLUMNS = 5, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(spelling: str, rows: int, columns: int) -> QTensor:
    return methods.named("rtn")(normal(rows, columns, seed=rows), formats.parse(spelling), Facts.none(columns))


def scale(length: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (normal(length, seed=length).abs() + 0.5).to(dtype)


def every_kind() -> Terms:
    """Every kind of term, nested, with every scale that there is; and a matrix that has nothing to learn."""
    product = Product(rounded("sign/channel", ROWS, 4), scale(4), rounded("sign/channel", 4, 7))
    dense = Terms((ROWS, 5), (Dense(rounded("int2/g3/min", ROWS, 5)),), scale(ROWS, torch.bfloat16), -scale(5))
    columns = Columns(torch.tensor([3, 11, 0, 5, 7, 1, 2, 4, 6, 8, 9, 10], dtype=torch.uint16), (product, dense))
    fixed = Dense(rounded("mxfp4", ROWS, COLUMNS))
    sparse = Sparse.of(torch.zeros(ROWS, COLUMNS).index_fill(1, torch.tensor([2]), 0.7))
    return Terms((ROWS, COLUMNS), (columns, fixed, sparse), None, scale(COLUMNS, torch.float32))


def test_every_stored_scale_is_learned_and_nothing_moves_at_first() -> None:
    made = every_kind()
    learner = learned(normal(ROWS, COLUMNS), made)
    assert set(learner.start) == {
        *("0.0.left.scale", "0.0.right.scale", "0.0.middle"),
        *("0.1.0.scale", "0.1.0.minimum", "0.1.row_scale", "0.1.column_scale"),
        "column_scale",
    }
    assert torch.equal(learner.weight(learner.start), made.dequantize())
    assert torch.equal(learner.freeze(learner.start).dequantize(), made.dequantize())


def test_what_is_shown_is_what_is_kept_and_codes_stay() -> None:
    made = every_kind()
    learner = learned(normal(ROWS, COLUMNS), made)
    values = {
        name: 0.4 * normal(*array.shape, seed=i).clamp(-1, 1) for i, (name, array) in enumerate(learner.start.items())
    }
    frozen = learner.freeze(values)
    assert torch.equal(frozen.dequantize(), learner.weight(values))
    assert not torch.equal(frozen.dequantize(), made.dequantize())
    for before, after in zip(matrices(made), matrices(frozen), strict=True):
        assert torch.equal(before.packed, after.packed)


def test_gradient_of_every_stored_number() -> None:
    """The weight is linear in each stored number alone, so that any step shows its gradient."""
    learner, grad = learned(normal(ROWS, COLUMNS), every_kind()), normal(ROWS, COLUMNS, seed=9)
    found, before = learner.gradient(learner.start, grad), learner.weight(learner.start).double()
    for name, array in learner.start.items():
        for index in itertools.product(*map(range, array.shape)):
            values = {key: value.clone() for key, value in learner.start.items()}
            values[name][index] = 0.5
            change = (learner.weight(values).double() - before) * grad.double()
            # half a unit, itself off by the rounding of the array to bfloat16 or float16
            assert abs(0.5 * float(found[name][index]) - float(change.sum())) <= 0.01 * float(change.abs().sum()) + 1e-5


def test_one_matrix_learns_as_ever() -> None:
    start = rounded("int3/g4/min", ROWS, COLUMNS)
    assert isinstance(learned(normal(ROWS, COLUMNS), start), Scales)
    learner = learned(normal(ROWS, COLUMNS), Terms((ROWS, COLUMNS), (Dense(start),)))
    plain, grad = Scales(normal(ROWS, COLUMNS), start), normal(ROWS, COLUMNS, seed=2)
    found = learner.gradient(learner.start, grad)
    for name, expected in plain.gradient(plain.start, grad).items():
        assert torch.equal(found[f"0.{name}"], expected)


@pytest.mark.parametrize("method", ["squeezellm"])
def test_sums_of_other_methods_can_be_tuned(method: str) -> None:
    weight = normal(ROWS, COLUMNS)
    made = methods.named(method)(weight, formats.parse("palette2/row"), Facts.none(COLUMNS), outliers=0.1)
    learner = learned(weight, made)
    assert isinstance(learner, Sum) and set(learner.start) == {"0.table"}


def beside() -> tuple[Tensor, Terms]:
    """A weight, and columns of it that have a book of their own."""
    x = normal(200, COLUMNS, seed=1) @ normal(COLUMNS, COLUMNS, seed=2)
    weight, options = normal(16, COLUMNS), {"outliers": 0.25, "outlier_bits": 4}
    made = methods.vptq(weight, formats.parse("vector4x3+2"), Facts.of(x, gram=True), **options)
    assert isinstance(made, Terms)
    return weight, made


@pytest.mark.parametrize("name", ["books", "vectors"])
def test_books_side_by_side_learn_as_each_does_alone(name: str) -> None:
    weight, made = beside()
    row, grad = methods.tuning(name), normal(16, COLUMNS, seed=3)
    learner = row.learn(weight, made)
    assert row.sums and torch.equal(learner.weight(learner.start), made.dequantize())
    values = {key: 0.3 * normal(*a.shape, seed=i) for i, (key, a) in enumerate(learner.start.items())}
    frozen, found = learner.freeze(values), learner.gradient(values, grad)
    assert torch.equal(frozen.dequantize(), learner.weight(values))
    (columns,) = made.terms
    assert isinstance(columns, Columns)
    split = zip(matrices(made), matrices(frozen), columns.permutation.long().split([3, COLUMNS - 3]), strict=True)
    for i, (before, after, own) in enumerate(split):
        alone = row.learn(weight[:, own], before)
        mine = {key: values[f"0.{i}.{key}"] for key in alone.start}
        assert torch.equal(after.dequantize(), alone.weight(mine))
        assert torch.equal(after.packed, before.packed) == (name == "books")
        for key, expected in alone.gradient(mine, grad[:, own].contiguous()).items():
            assert torch.equal(found[f"0.{i}.{key}"], expected)


@pytest.mark.parametrize("options", [{}, {"outliers": 0.25, "outlier_bits": 4}])
def test_vectors_under_scales_start_on_the_side_of_the_float_weight(options: dict[str, float]) -> None:
    """And stay the codes that they are; of scales that hold a zero nothing is known, and all starts where it is."""
    weight = normal(16, COLUMNS) * scale(16).float()[:, None] ** 3
    x = normal(200, COLUMNS, seed=1) @ normal(COLUMNS, COLUMNS, seed=2)
    made = methods.vptq(weight, formats.parse("vector4x4"), Facts.of(x, gram=True), norm="both", **options)
    assert isinstance(made, Terms) and made.row_scale is not None and made.column_scale is not None
    learner = chosen(weight, made)
    assert isinstance(learner, Sum) and torch.equal(learner.weight(learner.start), made.dequantize())
    sides = [one._weight.flatten(1).T for one in learner._matrices.values() if isinstance(one, Vectors)]
    beside = torch.cat(sides, 1)
    if isinstance(made.terms[0], Columns):
        beside = beside[:, torch.argsort(made.terms[0].permutation.long())]
    started = beside * made.row_scale.float()[:, None] * made.column_scale.float()
    assert (started - weight).abs().sum() < 0.8 * (made.dequantize() - weight).abs().sum()
    dead = replace(made, row_scale=made.row_scale.index_fill(0, torch.tensor([3]), 0))
    still = chosen(weight, dead)
    assert torch.equal(still.weight(still.start), dead.dequantize())


def test_where_vectors_are_chosen_again_other_matrices_stand_still() -> None:
    """A sum of two: neither term alone stands for the weight, so that each starts, and stays, where it is."""
    vectors, dense = rounded("vector2x2", 6, COLUMNS), rounded("int4/g4/min", 6, COLUMNS)
    made = Terms((6, COLUMNS), (Dense(vectors), Dense(dense)), scale(6), scale(COLUMNS))
    learner = chosen(normal(6, COLUMNS), made)
    assert isinstance(learner, Sum) and set(learner.start) == {"0.offset", "0.codebook", "row_scale", "column_scale"}
    assert isinstance(learner._matrices[("0",)], Vectors)
    assert not learner.gradient(learner.start, normal(6, COLUMNS, seed=5))["0.offset"].any()
    values = {key: 0.3 * normal(*array.shape, seed=4) for key, array in learner.start.items()}
    end = learner.freeze(values)
    assert torch.equal(end.dequantize(), learner.weight(values))
    assert not torch.equal(matrices(end)[0].dequantize(), vectors.dequantize())
    assert torch.equal(matrices(end)[1].dequantize(), dense.dequantize())


@pytest.mark.parametrize("options", [{}, {"outliers": 0.25, "outlier_bits": 4}])
def test_norms_learn_beside_vectors_that_are_chosen_again(options: dict[str, float]) -> None:
    """The gradient of every norm where vectors, books and norms have moved, from the definition in float64: with V what
    vectors stand for, W = diag(r) V diag(c) is linear in r and in c, whatever V is; and the same by differences."""
    weight = normal(16, COLUMNS) * scale(16).float()[:, None] ** 3
    x = normal(200, COLUMNS, seed=1) @ normal(COLUMNS, COLUMNS, seed=2)
    made = methods.vptq(weight, formats.parse("vector4x4"), Facts.of(x, gram=True), norm="both", **options)
    learner, grad = chosen(weight, made), normal(16, COLUMNS, seed=9)
    assert isinstance(learner, Sum)
    values = {key: 0.2 * normal(*a.shape, seed=i).clamp(-1, 1) for i, (key, a) in enumerate(learner.start.items())}
    found, end = learner.gradient(values, grad), learner.freeze(values)
    assert isinstance(end, Terms) and torch.equal(end.dequantize(), learner.weight(values))
    shown, pulled = replace(end, row_scale=None, column_scale=None).dequantize().double(), grad.double()
    assert not torch.equal(shown.float(), replace(made, row_scale=None, column_scale=None).dequantize())
    before = learner.weight(values).double()
    for name, axis in (("row_scale", 1), ("column_scale", 0)):
        start, moved, other = getattr(made, name), getattr(end, name), ("column_scale", "row_scale")[axis == 0]
        assert torch.equal(moved, (start.float() * (1 + SHARE * values[name])).half())
        across = shown * getattr(end, other).double().unsqueeze(1 - axis) * pulled
        expected = across.sum(axis) * start.double() * SHARE
        assert bool(((found[name] - expected).abs() <= 1e-5 * (across * start.unsqueeze(axis)).abs().sum(axis)).all())
        for i in range(len(start)):
            further = {key: value.clone() for key, value in values.items()}
            further[name][i] += 0.5
            change = (learner.weight(further).double() - before) * pulled
            # half a unit, itself off by the rounding of both ends to float16
            limit = 2.0**-10 / (0.5 * SHARE) * float(change.abs().sum()) + 1e-5
            assert abs(0.5 * float(found[name][i]) - float(change.sum())) <= limit
