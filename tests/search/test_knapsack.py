# SPDX-License-Identifier: Apache-2.0
"""Choosing within a budget, against all assignments there are, and against the closed form of high rates."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import SpecError
from fewbit.search.knapsack import choose


def whole(values: np.ndarray, chosen: tuple[int, ...]) -> float:
    return sum(row[at] for row, at in zip(values.tolist(), chosen, strict=True))


def every(costs: np.ndarray) -> list[tuple[int, ...]]:
    units, candidates = costs.shape
    return list(itertools.product(range(candidates), repeat=units))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.floats(0, 1))
def test_against_every_assignment(units: int, candidates: int, seed: int, share: float) -> None:
    """Harms in any order, so hulls matter; whole numbers below 6 make ties."""
    draw = np.random.default_rng(seed)
    costs = draw.integers(1, 12, (units, candidates))
    harms = draw.integers(0, 6, (units, candidates)) if seed % 2 else draw.random((units, candidates))
    least, most = int(costs.min(1).sum()), int(costs.max(1).sum())
    budget = least + int(share * (most - least))
    found = choose(costs, harms.astype(float), budget)
    able = [chosen for chosen in every(costs) if whole(costs, chosen) <= budget]
    best = min(whole(harms, chosen) for chosen in able)
    assert found.cost == whole(costs, found.chosen) <= budget
    assert found.harm == pytest.approx(whole(harms, found.chosen))
    assert found.bound <= best + 1e-9 and best <= found.harm + 1e-9
    # the choices of a price are the best of all that cost no more
    priced = whole(costs, found.priced)
    assert whole(harms, found.priced) == pytest.approx(
        min(whole(harms, chosen) for chosen in able if whole(costs, chosen) <= priced)
    )
    # what is left is spent: no change of one unit that fits takes off harm
    assert found.harm <= whole(harms, found.priced) + 1e-9
    for unit, candidate in itertools.product(range(units), range(candidates)):
        other = (*found.chosen[:unit], candidate, *found.chosen[unit + 1 :])
        assert whole(costs, other) > budget or whole(harms, other) >= found.harm - 1e-9
    # and no more is lost than what one unit can make of its choice
    assert found.harm - best <= float((harms.max(1) - harms.min(1)).max()) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_where_steps_cost_the_same_and_bring_less_and_less(seed: int) -> None:
    draw = np.random.default_rng(seed)
    harms = np.sort(draw.random((4, 4)), axis=1).cumsum(1)[:, ::-1].copy()  # convex and falling
    costs = np.tile(np.arange(1, 5) * 7, (4, 1))
    for budget in range(28, 113, 3):
        best = min(whole(harms, chosen) for chosen in every(costs) if whole(costs, chosen) <= budget)
        assert choose(costs, harms, budget).harm == pytest.approx(best)


def test_it_finds_the_closed_form_of_high_rates() -> None:
    """h_u(b) = a_u 4^-b gives b_u = mean + log2(a_u / geometric mean) / 2, up to rounding to whole bits."""
    scale = 4.0 ** np.random.default_rng(0).uniform(-2, 2, 64)
    bits = np.arange(1, 13)
    found = choose(np.tile(bits, (64, 1)), scale[:, None] * 4.0**-bits, 64 * 6)
    expected = 6 + (np.log2(scale) - np.log2(scale).mean()) / 2
    assert found.cost == 64 * 6
    assert np.abs(bits[list(found.chosen)] - expected).max() <= 1


def test_it_takes_the_least_harm_where_the_budget_allows_it_and_the_cheaper_of_equals() -> None:
    found = choose(np.array([[5, 3, 4], [2, 2, 9]]), np.array([[1.0, 1.0, 2.0], [3.0, 2.5, 2.5]]), 100)
    assert (found.chosen, found.cost, found.harm, found.bound) == ((1, 1), 5, 3.5, 3.5)


def test_what_cannot_be_is_refused() -> None:
    costs = np.array([[2, 3]])
    with pytest.raises(SpecError, match="cheapest candidates take 2"):
        choose(costs, np.ones((1, 2)), 1)
    for harms in (np.array([[1.0, math.nan]]), np.ones((2, 2))):
        with pytest.raises(SpecError, match="finite"):
            choose(costs, harms, 5)
