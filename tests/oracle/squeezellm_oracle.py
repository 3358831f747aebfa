# SPDX-License-Identifier: Apache-2.0
"""SqueezeLLM from its definition, in float64, one entry at a time: slow, and written apart from the code."""

from __future__ import annotations

import itertools

import numpy as np


def outliers(weight: np.ndarray, share: float) -> np.ndarray:
    """Entries outside of [-T, T], T = max(|Q1 - r IQR|, |Q3 + r IQR|), r found by bisection for that share. Boolean."""
    first, third = np.percentile(weight, [25, 75])
    wanted, (low, high) = round(share * weight.size), (-10.0, 1e4)
    for _ in range(200):
        r = (low + high) / 2
        threshold = max(abs(first - r * (third - first)), abs(third + r * (third - first)))
        number = int((np.abs(weight) > threshold).sum())
        if number == wanted:
            break
        low, high = (r, high) if number > wanted else (low, r)
    return np.abs(weight) > threshold


def levels(values: np.ndarray, worth: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The best ``count`` levels of one row and what they cost, trying every cut of the sorted values."""
    order = np.argsort(values)
    x, w = values[order], worth[order]
    n = len(x)

    def cost(begin: int, end: int) -> float:
        weight = w[begin:end].sum()
        if weight == 0:
            return 0.0
        mean = (w[begin:end] * x[begin:end]).sum() / weight
        return float((w[begin:end] * (x[begin:end] - mean) ** 2).sum())

    costs = [[cost(begin, end) if begin < end else 0.0 for end in range(n + 1)] for begin in range(n + 1)]
    best = [costs[0][end] for end in range(n + 1)]
    cuts: list[list[int]] = []
    for _ in range(1, count):
        choices = [[best[begin] + costs[begin][end] for begin in range(end + 1)] for end in range(n + 1)]
        cuts.append([int(np.argmin(row)) for row in choices])
        best = [min(row) for row in choices]
    ends, end = [n], n
    for row in reversed(cuts):
        end = row[end]
        ends.append(end)
    bounds = [0, *reversed(ends)]
    means = [np.average(x[a:b], weights=w[a:b]) for a, b in itertools.pairwise(bounds) if w[a:b].sum() > 0]
    return np.array(means), best[n]


def objective(weight: np.ndarray, fisher: np.ndarray, count: int, kept: np.ndarray) -> float:
    """The least ``sum F (w - w_hat)^2`` over the entries that are not ``kept`` apart, a table a row."""
    return sum(levels(row[~out], worth[~out], count)[1] for row, worth, out in zip(weight, fisher, kept, strict=True))
