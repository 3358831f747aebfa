# SPDX-License-Identifier: Apache-2.0
"""One candidate for each unit, so that the harms add up to least within a budget: the Lagrangian rule.

::

    min  sum_u h[u, s_u]   s.t.  sum_u c[u, s_u] <= C            h: harm, c: cost
    s_u(l) = argmin_s h[u, s] + l c[u, s]                        every unit on its own, for a price l >= 0
    g(l)   = sum_u min_s (h[u, s] + l c[u, s]) - l C             <= the least harm there is, for every l

The least price whose choices fit the budget is found by bisection. Whatever is then left of the budget goes, step by
step, to the change that takes off most harm for its cost. The choices of a price are the best that there are at the
cost that they have (Everett 1963, doi:10.1287/opre.11.3.399); g says how far from the best the end can be at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewbit.errors import SpecError

Costs = NDArray[np.int64]
Harms = NDArray[np.float64]
_HALVINGS = 2200
"""More than there are between any two float64; bisection ends where no number is left between its ends."""


@dataclass(frozen=True)
class Choices:
    """``chosen``: a candidate's index for every unit. ``cost`` and ``harm`` of them together; no choice within the
    budget has less harm than ``bound``. ``priced``: what the Lagrangian rule alone chose."""

    chosen: tuple[int, ...]
    cost: int
    harm: float
    bound: float
    priced: tuple[int, ...]


def choose(costs: Costs, harms: Harms, budget: int) -> Choices:
    """Choose for every unit.

    Args:
        costs: (units, candidates), whole numbers, bytes.
        harms: (units, candidates), finite.
        budget: the most that the chosen may cost together.

    Raises:
        SpecError: the cheapest candidates cost more than the budget, or the arrays do not fit.
    """
    if costs.ndim != 2 or costs.shape != harms.shape or not costs.size or not np.isfinite(harms).all():
        found = f"costs {costs.shape} and harms {harms.shape}, or a harm that is not finite"
        raise SpecError("choosing candidates", found, "two arrays (units, candidates) of finite numbers")
    if (least := int(costs.min(1).sum())) > budget:
        raise SpecError(f"a budget of {budget} bytes", f"the cheapest candidates take {least}", "give more")
    # by cost, so that of equal sums the first, which argmin takes, is the cheapest
    order = np.lexsort((harms, costs), axis=1)
    c, h = np.take_along_axis(costs, order, 1), np.take_along_axis(harms, order, 1)
    at, bound = _priced(c, h, budget)
    priced = at.copy()
    _spend(c, h, at, budget)
    units = np.arange(len(c))
    total, harm = int(c[units, at].sum()), float(h[units, at].sum())
    return Choices(_indices(order, at), total, harm, min(bound, harm), _indices(order, priced))


def _indices(order: NDArray[np.intp], at: NDArray[np.intp]) -> tuple[int, ...]:
    return tuple(int(i) for i in order[np.arange(len(order)), at])


def _priced(c: Costs, h: Harms, budget: int) -> tuple[NDArray[np.intp], float]:
    """What the least price that fits the budget chooses, and the largest g found on the way to it."""
    units, bound = np.arange(len(c)), -np.inf

    def at(price: float) -> tuple[NDArray[np.intp], bool]:
        nonlocal bound
        whole = h + price * c
        chosen = whole.argmin(1)
        bound = max(bound, float(whole[units, chosen].sum()) - price * budget)
        return chosen, int(c[units, chosen].sum()) <= budget

    chosen, fits = at(0.0)
    if fits:
        return chosen, bound
    low, high = 0.0, 1.0
    while not at(high)[1]:
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if at(middle)[1] else (middle, high)
    return at(high)[0], bound


def _spend(c: Costs, h: Harms, at: NDArray[np.intp], budget: int) -> None:
    """Change ``at`` in place: while a change fits that takes off harm, the one that takes off most for its cost."""
    units = np.arange(len(c))
    while True:
        more, less = c - c[units, at][:, None], h[units, at][:, None] - h
        able = (less > 0) & (more <= budget - int(c[units, at].sum()))
        if not able.any():
            return
        worth = np.where(able, less / np.maximum(more, 1), -1.0)
        unit, candidate = np.unravel_index(int(worth.argmax()), worth.shape)
        at[unit] = candidate
