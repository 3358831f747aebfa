# SPDX-License-Identifier: Apache-2.0
"""Bits of tiles by trying every choice, and by lambda, in float64 from the definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weighted(weight: Array, values: Array, square: Array, size: int) -> Array:
    """``sum square_i (w - w_hat)^2`` of each tile of ``size`` columns."""
    lost = (square * (weight - values) ** 2).sum(0)
    return np.array([lost[first : first + size].sum() for first in range(0, len(lost), size)])


def stored(choice: tuple[int, ...], shape: tuple[int, int], size: int, params: dict[int, list[tuple[int, int]]]) -> int:
    """Bytes of a matrix of ``shape`` (rows, columns) with tiles of the widths ``choice``. ``params``, by the width: the
    columns that share an entry, and its bits. Rows of codes and of entries end in whole bytes; a column of the order
    takes 2."""
    rows, columns = shape
    row = 0
    for width in set(choice):
        own = [min(size, columns - i * size) for i, bits in enumerate(choice) if bits == width]
        row += -(-sum(own) * width // 8)
        row += sum(-(-sum(-(-tile // each) for tile in own) * bits // 8) for each, bits in params[width])
    return rows * row + 2 * columns


def choices(widths: Iterable[int], tiles: int) -> list[tuple[int, ...]]:
    return list(itertools.product(widths, repeat=tiles))


def by_lambda(errors: dict[int, Array], price: float) -> tuple[int, ...]:
    """``argmin_b err_t(b) + price b`` of every tile t; ``errors`` by the width."""
    tiles = len(next(iter(errors.values())))
    return tuple(min(errors, key=lambda b, t=t: errors[b][t] + price * b) for t in range(tiles))  # type: ignore[misc]


def prices(errors: dict[int, Array]) -> list[float]:
    """One price between any two neighbouring ones at which a tile may change its width, and one beyond them."""
    pairs = itertools.combinations(sorted(errors), 2)
    edges = sorted({float(edge) for b, c in pairs for edge in (errors[b] - errors[c]) / (c - b)})
    return [(one + other) / 2 for one, other in itertools.pairwise([*edges, 2 * edges[-1]]) if one > 0]


def cost(choice: tuple[int, ...], errors: dict[int, Array]) -> float:
    return float(sum(errors[bits][tile] for tile, bits in enumerate(choice)))


def cut(values: Array, percentile: float) -> Array:
    """``values`` between two percentiles of them, linearly interpolated."""
    ordered, last = np.sort(values), len(values) - 1

    def at(share: float) -> float:
        place = share * last
        low = min(int(place), last)
        high = min(low + 1, last)
        return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    return np.clip(values, at(1 - percentile / 100), at(percentile / 100))
