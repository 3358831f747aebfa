# SPDX-License-Identifier: Apache-2.0
"""VPTQ against the float64 oracle, step by step; the laws of methods; what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.methods import codebooks, feedback, objective, rtn, vptq
from oracle import vptq_oracle as oracle
from oracle.cases import case

PLAIN = {"rounds": 0, "beam": 1, "restarts": 1, "never_worse": False}
"""The paper's two sweeps and nothing else."""


def identity(columns: int) -> Facts:
    """Of inputs that are uncorrelated and of one size."""
    ones = torch.full((columns,), 1000.0)
    return Facts(columns, 1000, torch.zeros(columns), ones, torch.ones(columns), 1000 * torch.eye(columns))


def slow(q: QTensor) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Books (groups, entries, length), indices (books, vectors, columns) and columns of a group, by bits of codes."""
    codes, params = q.logical()
    books, indices, rest = [], [], codes.long().numpy()
    for param in q.format.params:
        books.append(params[param.name][0, :, 0].double().numpy())
        indices.append(rest % param.entry[0])
        rest = rest // param.entry[0]
    return books, np.stack(indices), q.format.block or q.shape[1]


def coded(q: QTensor) -> codebooks.Coded:
    return codebooks.Coded.of(q)


def moment_of(facts: Facts) -> np.ndarray:
    return facts.second_moment.double().numpy()


@pytest.mark.parametrize("block_size", [7, 128])
@pytest.mark.parametrize("name", ["vector2x4", "vector4x5/g8", "vector4x4+4", "vector2x4+4/g10"])
def test_codes_are_those_of_the_paper_s_sweeps(name: str, block_size: int) -> None:
    for seed in range(3):
        weight, facts = case(24, 20, seed)
        q = vptq(weight, formats.parse(name), facts, block_size=block_size, **PLAIN)
        books, indices, width = slow(q)
        found, _ = oracle.sweep(weight.double().numpy(), moment_of(facts), books, width, 0.01)
        assert np.array_equal(found, indices)


def test_books_are_means_weighted_by_the_diagonal() -> None:
    """So few vectors that k-means sees them all and ends: each entry is the mean of those nearest to it, weighted by
    E[x^2] of their columns; of the residual book, of what the first sweep left of the values it saw."""
    for seed in range(4):
        weight, facts = case(12, 30, seed)
        books, _, width = slow(vptq(weight, formats.parse("vector2x4+4"), facts, **PLAIN))
        worth, values = facts.mean_square.double().numpy(), weight.double().numpy()
        for book in books:
            vectors = values.T.reshape(30, 6, 2)
            owner = ((vectors[:, :, None] - book[0]) ** 2).sum(-1).argmin(-1)
            for entry in range(16):
                mine = owner == entry
                shares = np.broadcast_to(worth[:, None], owner.shape)[mine]
                mean = (vectors[mine] * shares[:, None]).sum(0) / shares.sum()
                np.testing.assert_allclose(book[0, entry], mean, rtol=2.0**-10, atol=2e-6)
            indices, seen = oracle.sweep(weight.double().numpy(), moment_of(facts), [book], width, 0.01)
            values = seen - oracle.decoded([book], indices, width)
    flat = vptq(weight, formats.parse("vector2x4"), identity(30), **PLAIN)
    assert not np.array_equal(slow(flat)[0][0], books[0]), "the weights matter"


@pytest.mark.parametrize("name", ["vector2x4", "vector4x5/g16", "vector8x6"])
def test_identity_second_moment_is_rounding(name: str) -> None:
    weight, format = case(45, 48, seed=1)[0], formats.parse(name)
    q, plain = vptq(weight, format, identity(48), **PLAIN), rtn(weight, format)
    assert torch.equal(q.packed, plain.packed)
    assert all(torch.equal(values, plain.params[key]) for key, values in q.params.items())


@pytest.mark.parametrize("name", ["vector2x4", "vector2x4/g7", "vector4x4+4", "vector2x4+4/g9"])
def test_refitted_books_are_those_of_a_dense_solve(name: str) -> None:
    weight, facts = case(24, 20, seed=3)
    q = vptq(weight, formats.parse(name), facts, **PLAIN)
    books, indices, width = slow(q)
    hessian = oracle.damped(moment_of(facts), 0.01)
    best = oracle.least_squares(weight.double().numpy(), hessian, books, indices, width)
    damped = torch.from_numpy(hessian).float()
    found = codebooks.refitted(weight.T.contiguous(), (coded(q),), damped, steps=400)
    error = weight.double().numpy() - oracle.decoded(best, indices, width)
    least, start = oracle.loss(error, hessian), codebooks.loss(weight.T, (coded(q),), damped)
    assert least < 0.97 * start
    # sums of two books can be the same weights in many ways, and rounding to float16 moves each entry by 2^-11
    assert codebooks.loss(weight.T, found, damped) <= 1.001 * least
    if len(books) == 1:
        for book, exact in zip(found[0].books, best, strict=True):
            np.testing.assert_allclose(book.numpy(), exact, rtol=2.0**-10, atol=1e-3)
    few = codebooks.refitted(weight.T.contiguous(), (coded(q),), damped, steps=2)
    assert codebooks.loss(weight.T, few, damped) < start


@pytest.mark.parametrize("name", ["vector2x4", "vector2x4/g7", "vector4x4+4"])
def test_descent_takes_what_loses_least_of_all(name: str) -> None:
    weight, facts = case(12, 15, seed=6)
    q = vptq(weight, formats.parse(name), facts, **PLAIN)
    books, indices, width = slow(q)
    passing = feedback.factorize(facts.second_moment, 0.01, by_activity=True)
    moment = feedback.damped(facts.second_moment, passing)
    before = coded(q)
    for batch in (4, 128):
        choice = codebooks.Choice(before.books, (15, 12), width, 16, before)
        feedback.descend(weight, before.decode().T, moment, passing, choice, batch)
        found = choice.coded()
        hessian = oracle.damped(moment_of(facts), 0.01)
        expected = oracle.descent(weight.double().numpy(), hessian, books, indices, width)
        assert np.array_equal(np.stack([index.T.numpy() for index in found.indices]), expected)
        assert not np.array_equal(expected, indices)


def test_a_beam_of_all_is_a_search_of_all_sums() -> None:
    points = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    first, second = (torch.randn(16, 4, generator=torch.Generator().manual_seed(s)) * s**-0.5 for s in (1, 4))
    sums = (first[:, None] + second).flatten(0, 1).double()
    exact = torch.cdist(points.double(), sums).argmin(1)
    found = codebooks.nearest(points, [first, second], 16)
    assert torch.equal(found[0] * 16 + found[1], exact)
    greedy = codebooks.nearest(points, [first, second], 1)
    assert [oracle.nearest(p, [first.double().numpy(), second.double().numpy()]) for p in points.double().numpy()] == (
        torch.stack(greedy, 1).tolist()
    )
    kept = codebooks.nearest(points, [first, second], 1, present=found)
    assert torch.equal(kept[0] * 16 + kept[1], exact), "what was chosen before stays where nothing nearer is found"


@pytest.mark.parametrize("name", ["vector2x4", "vector4x5/g8", "vector4x4+4", "vector6x4"])
def test_every_step_lowers_the_loss_and_none_ends_above_rounding(name: str) -> None:
    weight, facts = case(40, 24, seed=7)  # 40 rows are no whole vectors of 6
    format = formats.parse(name)

    def lost(q: QTensor) -> float:
        return float(objective.row_errors(weight - q.dequantize(), facts).sum())

    found = [vptq(weight, format, facts, rounds=rounds) for rounds in (0, 1, 8)]
    assert not torch.equal(found[0].params["codebook"], found[1].params["codebook"]), "books are refitted"
    assert not torch.equal(found[0].packed, found[1].packed), "codes are chosen again"
    losses = [lost(q) for q in found]
    assert losses[0] > losses[1] > losses[2]
    assert losses[0] < lost(rtn(weight, format))


def test_where_rounding_loses_less_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, facts = case(16, 20, seed=2)
    format = formats.parse("vector2x4")
    good = vptq(weight, format, facts, rounds=0)

    def zeros(weight: Tensor, passing: object, choice: codebooks.Beside, batch: int) -> None:
        for column in range(weight.shape[1]):
            choice(column, torch.zeros(len(weight)))

    monkeypatch.setattr(feedback, "sweep", zeros)
    kept = vptq(weight, format, facts, rounds=0)
    bad = vptq(weight, format, facts, rounds=0, never_worse=False)
    points = weight.T.reshape(20, 8, 2)
    plain = codebooks.all_nearest(points, coded(good).books, 20, 8).qtensor(format, 16)
    assert torch.equal(kept.packed, plain.packed)
    assert not torch.equal(bad.packed, plain.packed)


def test_no_token_and_silent_inputs() -> None:
    weight, facts = case(12, 20, seed=4)
    format = formats.parse("vector4x4")
    assert torch.equal(vptq(weight, format, Facts.none(20, gram=True)).packed, rtn(weight, format).packed)
    assert vptq(weight, format, Facts.of(torch.zeros(7, 20), gram=True)).dequantize().isfinite().all()
    silent = torch.tensor([0, 7, 19])
    gram = facts.gram.clone()
    gram[silent], gram[:, silent] = 0, 0
    some = Facts(20, facts.tokens, facts.total, gram.diagonal().clone(), facts.largest, gram)
    q = vptq(weight, format, some)
    books, indices, _ = slow(q)
    for column in silent.tolist():  # nothing to make up for, nothing that makes up for it
        for u in range(3):
            vector = weight[4 * u : 4 * u + 4, column].double().numpy()
            assert indices[0, u, column] == oracle.nearest(vector, [books[0][0]])[0]


def test_refusals() -> None:
    weight, facts = case(8, 16, seed=8)
    for name in ("int4/g8/sym", "palette4", "ternary/g8"):
        with pytest.raises(UnsupportedError, match="do not stand for several weights"):
            vptq(weight, formats.parse(name), facts)
    format = formats.parse("vector2x4")
    with pytest.raises(InputError, match="no second moment"):
        vptq(weight, format, Facts.of(torch.ones(3, 16)))
    with pytest.raises(InputError, match="of 24 inputs"):
        vptq(weight, format, case(1, 24, seed=0)[1])
    for name in ("block_size", "restarts", "beam", "rounds"):
        with pytest.raises(SpecError, match=f"{name}=-1"):
            vptq(weight, format, facts, **{name: -1})
    with pytest.raises(SpecError, match="between 0 and 1"):
        vptq(weight, format, facts, damp_percent=2.0)
    assert methods.named("gptq").refuse(format) and methods.named("vptq").refuse(format) is None


def test_arguments_random_state_and_threads_do_not_matter() -> None:
    weight, facts = case(48, 40, seed=12)
    before, state = (weight.clone(), facts.gram.clone()), torch.get_rng_state()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(vptq(weight, formats.parse("vector4x5+4/g16"), facts, rounds=2))
    assert torch.equal(found[0].packed, found[1].packed)
    assert all(torch.equal(values, found[1].params[key]) for key, values in found[0].params.items())
    assert torch.equal(weight, before[0]) and torch.equal(facts.gram, before[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rows", [60, 12])
def test_a_book_of_more_entries_than_vectors_holds_them_all(rows: int) -> None:
    """Those that the rows do not fill as well."""
    weight, facts = case(rows, 20, seed=3, tokens=200)
    found, halves = vptq(weight, formats.parse("vector8x8"), facts).dequantize(), weight.half().float()
    lost = objective.relative_error(weight, found, facts)
    assert lost <= objective.relative_error(weight, halves, facts) < 1e-3


def test_the_last_rows_are_nearest_by_what_there_is_of_them() -> None:
    """With a second moment that is the identity nothing is handed on, and what is nearest is what is taken."""
    weight = case(13, 24, seed=4)[0]
    found = vptq(weight, formats.parse("vector8x3"), Facts.of(torch.eye(24) * 24**0.5, gram=True), rounds=0)
    assert isinstance(found, QTensor)
    codes, params = found.logical()
    book = params["codebook"][0, 0, 0].double()[:, :5]
    nearest = (weight[8:].T.double()[:, None] - book).square().sum(2).argmin(1)
    assert torch.equal(codes[1].long(), nearest)
