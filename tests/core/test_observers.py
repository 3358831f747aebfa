# SPDX-License-Identifier: Apache-2.0
"""Observers against their definitions, in numpy and float64 on the numbers themselves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.core import observers as O
from fewbit.core.observers import BINS, Seen
from fewbit.errors import InputError, SpecError


def stream(seed: int, sizes: list[int], spread: float = 1.0) -> list[torch.Tensor]:
    """Batches whose ranges differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator) * 10 ** (spread * float(torch.randn((), generator=generator)))
        for size in sizes
    ]


def merged(batches: list[torch.Tensor]) -> Seen:
    seen = Seen.none()
    for batch in batches:
        seen = seen.merge(Seen.of(batch))
    return seen


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 50), min_size=1, max_size=5), st.floats(0, 8))
def test_merging_is_seeing_the_pool_in_any_order(seed: int, sizes: list[int], spread: float) -> None:
    batches = stream(seed, sizes, spread)
    pool = Seen.of(torch.cat(batches))
    for order in itertools.islice(itertools.permutations(batches), 3):
        left = merged(list(order))
        right = Seen.none()
        for batch in reversed(order):
            right = Seen.of(batch).merge(right)
        for seen in (left, right):
            assert (seen.exponent, seen.first) == (pool.exponent, pool.first)
            assert torch.equal(seen.counts, pool.counts)
            assert (seen.low, seen.high) == (pool.low, pool.high)
            assert seen.batches == tuple((float(b.min()), float(b.max())) for b in order)
    assert len(pool.counts) <= BINS and int(pool.counts.sum()) == sum(sizes)


def test_bins_are_where_they_say() -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.49, 0.5, 2.75])
    seen = Seen.of(torch.cat([x, torch.linspace(-3, 3, 5000)]))
    expected = np.floor(torch.cat([x, torch.linspace(-3, 3, 5000)]).double().numpy() / seen.width).astype(int)
    counts = np.bincount(expected - expected.min())
    assert seen.first == expected.min() and np.array_equal(seen.counts.numpy(), counts)
    assert len(seen.counts) > BINS // 2
    magnitudes = np.bincount(np.where(expected < 0, -expected - 1, expected))
    assert np.array_equal(seen.magnitudes().numpy(), magnitudes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(InputError, match="1 of 3 inputs are NaN or infinite"):
        Seen.of(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e20, 1e37])
def test_bins_are_those_of_float64_at_any_size(size: float) -> None:
    x = torch.cat([torch.randn(500, generator=torch.Generator().manual_seed(1)) * size, torch.tensor([-1e-45, 1e-45])])
    seen = Seen.of(x)
    wanted = np.floor(x.double().numpy() / seen.width).astype(np.int64) - seen.first
    assert seen.counts.tolist() == np.bincount(wanted).tolist()


def test_nothing_and_zeros_and_one_number() -> None:
    for seen in (Seen.none(), Seen.of(torch.zeros(9)), Seen.of(torch.zeros(0)).merge(Seen.of(torch.zeros(1)))):
        for observer in O.OBSERVERS:
            assert observer.range(seen, 8, False, **observer.options) == (0.0, 0.0)
    same = Seen.of(torch.full((7,), 3.0)).merge(Seen.of(torch.full((7,), 3.0)))
    for observer in O.OBSERVERS:
        low, high = observer.range(same, 8, False, **observer.options)
        scale, zero = O.grid(low, high, 8, False)
        assert abs(scale * (min(max(round(3.0 / scale) + zero, 0), 255) - zero) - 3.0) <= 3.0 / 255
    assert O.grid(0.0, 0.0, 8, False) == (2.0**-24, 0)


def test_minmax_and_the_moving_average() -> None:
    batches = stream(1, [10, 20, 30, 40])
    seen = merged(batches)
    assert O.minmax(seen, 8, True) == (float(torch.cat(batches).min()), float(torch.cat(batches).max()))
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low = 0.75 * low + 0.25 * float(batch.min())
        high = 0.75 * high + 0.25 * float(batch.max())
    assert O.average(seen, 8, True, share=0.25) == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("positive", [False, True])
def test_percentile_is_the_quantile_of_the_pool_to_within_a_bin(percent: float, positive: bool) -> None:
    batches = [batch.abs() if positive else batch for batch in stream(2, [3000, 500, 2500], 0.3)]
    seen = merged(batches)
    quantile = np.quantile(torch.cat(batches).abs().double().numpy(), percent / 100, method="inverted_cdf")
    low, high = O.percentile(seen, 8, False, percent=percent)
    assert abs(max(-low, high) - quantile) <= seen.width
    assert seen.low <= low and high <= seen.high


def numpy_grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[np.float32, int]:
    top = 2**bits - 1
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return np.float32(2 * max(-low, high) / top), 2 ** (bits - 1)
    scale = np.float32((high - low) / top)
    return scale, int(np.clip(np.rint(-low / float(scale)), 0, top))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_the_best_of_its_ratios_on_the_bins(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, generator=generator).pow(3)
    seen = merged(list(x.split(1500)))
    width = seen.width
    middles = (np.floor(x.double().numpy() / width) + 0.5) * width

    def lost(values: np.ndarray, low: float, high: float, power: float) -> float:
        scale, zero = numpy_grid(low, high, bits, symmetric)
        codes = np.clip(np.rint(values / float(scale) + zero), 0, 2**bits - 1)
        return float((np.abs(values - float(scale) * (codes - zero)) ** power).sum())

    for power in (2.0, 2.4):
        ratios = [1 - 0.8 * step / 99 for step in range(100)]
        table = [lost(middles, r * seen.low, r * seen.high, power) for r in ratios]
        low, high = O.mse(seen, bits, symmetric, power=power)
        found = high / seen.high
        assert min(abs(found - r) for r in ratios) < 1e-12 and low == pytest.approx(found * seen.low)
        at = int(np.argmin([abs(found - r) for r in ratios]))
        assert table[at] <= min(table) * (1 + 1e-9)
        # and on the numbers themselves it loses next to nothing against the best of the same ratios
        direct = [lost(x.double().numpy(), r * seen.low, r * seen.high, power) for r in ratios]
        assert direct[at] <= 1.05 * min(direct)
    assert found < 1  # heavy tails are clipped


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", ["tails", "floor"])
def test_dobi_is_the_best_of_both_searches_on_the_bins(shape: str, symmetric: bool, bits: int) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(6)).pow(3) + 1
    x = torch.nn.functional.gelu(x) if shape == "floor" else x
    seen = merged(list(x.split(1100)))
    low, high = seen.low, seen.high
    middles = (np.floor(x.double().numpy() / seen.width) + 0.5) * seen.width

    def lost(bounds: tuple[float, float]) -> float:
        scale, zero = numpy_grid(*bounds, bits, symmetric)
        codes = np.clip(np.rint(middles / float(scale) + zero), 0, 2**bits - 1)
        return float(((middles - float(scale) * (codes - zero)) ** 2).sum())

    half, whole = (high - low) / 200, (high - low) / 100
    two = [(low + i * half, high - i * half) for i in range(100)]
    one = [(low, high - i * whole) for i in range(100)]
    found = O.dobi(seen, bits, symmetric)
    assert min(math.dist(found, bounds) for bounds in two + one) < 1e-12
    assert lost(found) <= min(map(lost, two + one)) * (1 + 1e-9) < 0.9 * lost((low, high))
    if not symmetric and bits == 3:
        best = [min(map(lost, search)) for search in (two, one)]
        assert (best[0] < best[1]) == (shape == "tails"), "each search has what it is for"


def divergence(histogram: np.ndarray, edge: int, levels: int) -> float:
    """From the definition, bin by bin."""
    p = histogram[:edge].astype(float).copy()
    p[-1] += histogram[edge:].sum()
    q = np.zeros(edge)
    for level in range(levels):
        members = [k for k in range(edge) if k * levels // edge == level]
        live = [k for k in members if histogram[k] > 0]
        for k in live:
            q[k] = sum(histogram[k] for k in members) / len(live)
    if q.sum() == 0:
        return math.inf
    smoothed = []
    for values in (p, q):
        given = 1e-4 * np.count_nonzero(values == 0)
        kept = values * (1 - min(given / values.sum(), 0.5))
        kept[values == 0] = 1e-4
        smoothed.append(kept / kept.sum())
    return float((smoothed[0] * np.log(smoothed[0] / smoothed[1])).sum())


def test_entropy_is_the_least_divergence() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3000, generator=generator)
    x[:3] *= 12
    seen = merged([x[:1000], x[1000:].relu()])
    counts, width = seen.magnitudes().double().numpy(), seen.width
    while len(counts) > O.KL_BINS:
        counts, width = np.append(counts, [0.0] * (len(counts) % 2)).reshape(-1, 2).sum(1), 2 * width
    counts[0] = 0
    levels = 8
    table = {edge: divergence(counts, edge, levels) for edge in range(levels, len(counts) + 1, 97)}
    found = O._divergences(torch.from_numpy(counts), levels)
    for edge, expected in table.items():
        assert float(found[edge - levels]) == pytest.approx(expected, rel=1e-9)
    low, high = O.entropy(seen, 4, True)
    most = max(-low, high)
    edge = math.ceil(most / width - 1e-9)
    assert divergence(counts, edge, levels) <= min(table.values()) + 1e-12
    assert most < 0.7 * max(-seen.low, seen.high)  # three outliers of 3000 are clipped


@pytest.mark.parametrize("name", O.NAMES)
def test_grids_cover_zero_and_what_was_seen_is_near(name: str) -> None:
    x = stream(5, [2000], 0.0)[0].relu() + 0.5
    observer = O.named(name)
    low, high = observer.range(Seen.of(x), 8, False, **observer.options)
    scale, zero = O.grid(low, high, 8, False)
    assert zero == 0 and scale == numpy_grid(low, high, 8, False)[0]
    clipped = x.clamp_max(high)
    codes = (clipped / scale).round()
    assert float((scale * codes - clipped).abs().max()) <= scale / 2 * (1 + 1e-5)


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(SpecError, match="minmax, average, percentile, mse, entropy"):
        O.named("median")
