# SPDX-License-Identifier: Apache-2.0
"""Learned vectors: which weight they stand for, how its gradient reaches entries and choices, what is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.methods.scales import Scales
from fewbit.methods.vectors import Vectors

NAMES = ("vector2x4/g8", "vector4x5", "vector4x4+4", "vector2x6+4", "vector6x4")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(name: str, rows: int = 20, columns: int = 18) -> tuple[Tensor, QTensor]:
    """A weight, and what error feedback made of it: not its nearest vectors. 20 rows are no whole vectors of 6."""
    x = normal(200, columns, seed=1) @ normal(columns, columns, seed=2)
    weight = normal(rows, columns)
    return weight, methods.vptq(weight, formats.parse(name), Facts.of(x, gram=True), rounds=1)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_from_what_was_solved_bit_for_bit(name: str) -> None:
    weight, q = solved(name)
    assert not torch.equal(q.packed, methods.rtn(weight, q.format).packed)
    learner = Vectors(weight, q)
    end = learner.freeze(learner.start)
    assert torch.equal(learner.weight(learner.start), q.dequantize())
    assert torch.equal(end.packed, q.packed) and end.shape == q.shape
    assert all(torch.equal(values, q.params[key]) for key, values in end.params.items())
    nearer = (learner._weight.flatten(1).T[:20] - weight).abs().sum() < (q.dequantize() - weight).abs().sum()
    assert nearer, "weights start on their own side of their vectors"


def test_sums_that_no_search_would_find_stay_where_they_are() -> None:
    """The first vector of a sum may be far from it: nearer ones are tried, and lose."""
    format = formats.parse("vector2x6+4")
    codes = torch.randint(0, 1024, (10, 18), generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    books = {param.name: normal(*param.entry, seed=9 + i).half() for i, param in enumerate(format.params)}
    params = {name: book[None, None, None].expand(10, 1, 1, -1, -1) for name, book in books.items()}
    q = QTensor.of(format, codes, params)
    learner = Vectors(q.dequantize(), q)
    assert torch.equal(learner.freeze(learner.start).packed, codes)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_loss_sees_is_what_is_stored(name: str) -> None:
    weight, q = solved(name)
    learner = Vectors(weight, q)
    values = {key: 0.3 * normal(*array.shape, seed=3) for key, array in learner.start.items()}
    end = learner.freeze(values)
    assert torch.equal(end.dequantize(), learner.weight(values))
    assert not torch.equal(end.packed, q.packed)
    for param, unit in zip(q.format.params, learner._unit, strict=True):
        assert end.params[param.name].dtype == torch.float16
        moved = q.params[param.name][0, :, 0].float() + values[param.name] * unit
        assert torch.equal(end.params[param.name][0, :, 0], moved.half())


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_every_entry_and_of_every_move(name: str) -> None:
    """Under the codes there are, weights are linear in entries: an entry moved by its unit changes the weight by its
    gradient. Through the choice the gradient of a move is that of the weight, times the step."""
    weight, q = solved(name)
    learner, grad = Vectors(weight, q), normal(20, 18, seed=4)
    found = learner.gradient(learner.start, grad)
    length, (codes, params) = q.format.height, q.logical()
    rest, width = codes.long().numpy(), q.format.block or 18
    high = np.zeros((len(codes) * length, 18))
    high[:20] = grad.double().numpy()
    for param, unit in zip(q.format.params, learner._unit, strict=True):
        index, rest = rest % param.entry[0], rest // param.entry[0]
        expected = np.zeros(params[param.name][0, :, 0].shape)
        for u in range(len(codes)):
            for k in range(18):
                expected[k // width, index[u, k]] += high[u * length : (u + 1) * length, k]
        np.testing.assert_allclose(found[param.name].numpy(), expected * float(unit), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["offset"].flatten(1).T.numpy(), high * learner._step, rtol=1e-6)


def test_a_weight_moves_to_the_vector_that_its_gradient_asks_for() -> None:
    """Steps against the gradient of |W_hat - T|^2 lead to T, which is made of vectors that the matrix holds."""
    weight, q = solved("vector2x4")
    target = q.dequantize()[:, torch.randperm(18, generator=torch.Generator().manual_seed(5))]
    target = torch.where(normal(1, 18, seed=6) > 0.5, target, q.dequantize())
    learner, values = Vectors(weight, q), {}
    values = {key: array.clone() for key, array in learner.start.items()}
    row = methods.tuning("vectors")
    rule = row.descend()
    lost = [float((learner.weight(values) - target).square().sum())]
    for step in range(50):
        grads = learner.gradient(values, 2 * (learner.weight(values) - target))
        for key, grad in grads.items():
            rule.step(key, values[key], grad, row.rate(50, q.format) * (1 - step / 50))
            values[key].clamp_(*learner.bounds[key])
        lost.append(float((learner.weight(values) - target).square().sum()))
    assert lost[-1] < 0.6 * lost[0]
    assert not torch.equal(learner.freeze(values).packed, q.packed)


def test_books_are_learned_under_fixed_codes_and_stored_in_halves() -> None:
    row = methods.tuning("books")
    weight, q = solved("vector4x4+4")
    learner = row.learn(weight, q)
    assert isinstance(learner, Scales) and set(learner.start) == {"codebook", "residual"}
    end = learner.freeze({key: 0.1 * normal(*array.shape, seed=7) for key, array in learner.start.items()})
    assert torch.equal(end.packed, q.packed)
    assert all(values.dtype == torch.float16 for values in end.params.values())
    assert not torch.equal(end.dequantize(), q.dequantize())


def test_formats_without_a_codebook_of_vectors_are_refused() -> None:
    for name in ("books", "vectors"):
        assert methods.tuning(name).refuse(formats.parse("palette4/row"))
        assert methods.tuning(name).refuse(formats.parse("int4/g64/asym"))
        assert methods.tuning(name).refuse(formats.parse("vector4x8")) is None
