# SPDX-License-Identifier: Apache-2.0
"""Facts against float64 sums, and the laws of a monoid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.core import compiled
from fewbit.core import facts as module
from fewbit.core.facts import Accumulator, Facts
from fewbit.core.rewrite import Scale
from fewbit.core.sums import all_finite, column_sums, plain_column_sums
from fewbit.errors import InputError

EPS = torch.finfo(torch.float32).eps


def inputs(tokens: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator) * torch.randn(columns, generator=generator).exp()


def close(found: Facts, x: Tensor) -> None:
    """Every sum lies within ``tokens * eps * sum of magnitudes`` of its float64 value, the bound of any order."""
    exact, tokens = x.double(), x.shape[0]
    assert (found.tokens, found.columns) == tuple(x.shape)
    assert ((found.total - exact.sum(0)).abs() <= tokens * EPS * exact.abs().sum(0)).all()
    assert ((found.total_square - exact.square().sum(0)).abs() <= (tokens + 1) * EPS * exact.square().sum(0)).all()
    assert ((found.total_magnitude - exact.abs().sum(0)).abs() <= tokens * EPS * exact.abs().sum(0)).all()
    assert torch.equal(found.largest, x.abs().amax(0) if tokens else torch.zeros(x.shape[1]))
    assert found.gram is not None
    assert ((found.gram - exact.T @ exact).abs() <= (tokens + 1) * EPS * (exact.T.abs() @ exact.abs())).all()
    assert torch.equal(found.gram, found.gram.T)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5), columns=st.integers(1, 9), seed=st.integers(0, 10**6)
)
def test_sums_of_a_stream(sizes: list[int], columns: int, seed: int) -> None:
    x = inputs(sum(sizes), columns, seed)
    parts = x.split(sizes)
    stream = Accumulator(columns, gram=True)
    merged = Facts.none(columns, gram=True)
    for part in parts:
        stream.add(part)
        merged = merged.merge(Facts.of(part, gram=True))
    close(stream.facts(), x)
    close(merged, x)
    close(Facts.of(x, gram=True), x)


@pytest.mark.parametrize("columns", [1, 7, 130, 300])
def test_joining_in_place_is_merging_bit_for_bit(columns: int) -> None:
    one, two, three = inputs(60, columns, 0).split([33, 20, 7])
    joined = Accumulator.of(one, gram=True).join(Accumulator.of(two, gram=True)).join(Accumulator.of(three, gram=True))
    merged = Facts.of(one, gram=True).merge(Facts.of(two, gram=True)).merge(Facts.of(three, gram=True))
    got = joined.facts()
    assert (got.tokens, got.columns) == (merged.tokens, merged.columns)
    for name in ("total", "total_square", "largest", "gram"):
        assert torch.equal(getattr(got, name), getattr(merged, name)), name
    close(got, inputs(60, columns, 0))


def test_facts_of_different_layers_are_not_joined() -> None:
    for other in (Accumulator(4, gram=True), Accumulator(3)):
        with pytest.raises(InputError, match="different layers"):
            Accumulator(3, gram=True).join(other)


@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*[st.integers(0, 12)] * 3), seed=st.integers(0, 10**6))
def test_merging_is_a_monoid(sizes: tuple[int, int, int], seed: int) -> None:
    x = inputs(sum(sizes), 5, seed)
    a, b, c = (Facts.of(part, gram=True) for part in x.split(list(sizes)))
    close(a.merge(b).merge(c), x)
    close(a.merge(b.merge(c)), x)
    for left, right in ((a, a.merge(Facts.none(5, True))), (a, Facts.none(5, True).merge(a))):
        assert left.tokens == right.tokens
        for one, other in zip(_sums(left), _sums(right), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(_sums(a.merge(b)), _sums(b.merge(a)), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*[st.integers(0, 12)] * 3), seed=st.integers(0, 10**6))
def test_ends_are_those_of_the_whole_stream_and_of_the_scaled_one_bit_for_bit(
    sizes: tuple[int, int, int], seed: int
) -> None:
    x = inputs(sum(sizes), 5, seed)
    a, b, c = (Facts.of(part, ranges=True) for part in x.split(list(sizes)))
    scale = Scale(inputs(1, 5, seed + 1)[0].abs().half() + 2.0**-14)
    for whole in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        scaled = scale.facts(whole)
        assert whole.ends is not None and scaled.ends is not None
        if len(x):
            assert torch.equal(whole.ends, torch.stack((x.amin(0), x.amax(0))))
            assert torch.equal(scaled.ends, torch.stack((scale.apply(x).amin(0), scale.apply(x).amax(0))))
    assert Facts.of(x).ends is None and Facts.none(5).merge(a).ends is None


def _sums(facts: Facts) -> tuple[Tensor, ...]:
    assert facts.gram is not None
    return facts.total, facts.total_square, facts.largest, facts.gram


@pytest.mark.parametrize("columns", [1, 7, 31, 33, 97])
def test_tiles_cover_the_matrix(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 16)
    x = inputs(64, columns, seed=1)
    close(Facts.of(x, gram=True), x)


def test_reading_does_not_stop_the_stream() -> None:
    x = inputs(20, 6, seed=2)
    stream = Accumulator(6, gram=True)
    stream.add(x[:10])
    early = stream.facts()
    stream.add(x[10:])
    close(early, x[:10])
    close(stream.facts(), x)


def test_means() -> None:
    x = inputs(50, 4, seed=3).bfloat16()
    facts = Facts.of(x.reshape(5, 10, 4), gram=True)
    exact = x.double()
    assert torch.allclose(facts.mean_square.double(), exact.square().mean(0), rtol=50 * EPS)
    assert torch.allclose(facts.second_moment.double(), exact.T @ exact / 50, rtol=1e-5, atol=1e-6)
    assert torch.equal(Facts.none(3).mean_square, torch.ones(3))
    assert torch.equal(Facts.none(3, gram=True).second_moment, torch.eye(3))
    assert torch.equal(Facts.of(x).second_moment, torch.eye(4))


def test_refuses_other_widths() -> None:
    with pytest.raises(InputError, match="the last axis has 5 entries"):
        Accumulator(4).add(torch.ones(2, 5))
    with pytest.raises(InputError, match="different layers"):
        Facts.none(4).merge(Facts.none(5))


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 97])
def test_compiled_sums_of_columns_are_those_of_torch_bit_for_bit(rows: int, columns: int) -> None:
    native = compiled.grids()
    if native is None:
        pytest.skip("there is no compiled module")
    x = inputs(rows, columns, rows)
    wanted, found = plain_column_sums(x), torch.full((4, columns), torch.nan)
    assert torch.equal(column_sums(x), wanted)
    assert torch.equal(column_sums(x.repeat(1, 2)[:, :columns]), wanted)  # rows further apart
    native.column_sums((rows, columns), x.data_ptr(), found.data_ptr(), 0)  # the serial one
    assert torch.equal(found, wanted)
    close_to, bound = x.double(), max(rows, 1) * EPS
    for sums, exact in zip(wanted, (close_to, close_to.square(), close_to.abs()), strict=False):
        assert ((sums - exact.sum(0)).abs() <= (bound + EPS) * exact.abs().sum(0)).all()


def test_the_largest_is_no_number_where_one_is() -> None:
    x = inputs(70, 11, 0)
    x[3, 4], x[65, 10] = torch.nan, -torch.inf
    for found in (column_sums(x), plain_column_sums(x)):
        assert found[:, 4].isnan().all()
        assert found[3, 10] == torch.inf and found[:, :4].isfinite().all()


def test_numbers_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((3,), 3e38)) and all_finite(torch.full((3,), 6e4, dtype=torch.float16))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(torch.tensor([1.0, bad])) and not all_finite(torch.tensor([3e38, 3e38, bad]))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))
