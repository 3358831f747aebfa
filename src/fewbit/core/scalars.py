# SPDX-License-Identifier: Apache-2.0
"""Exact weighted k-means of numbers, by dynamic programming over sorted values (Wang and Song 2011, R Journal 3/2).

Clusters of numbers are intervals of the sorted values, and the cost of one comes from prefix sums of w, w x and w x^2::

    D[k][r] = min over l of D[k - 1][l] + cost(l, r)        cost = S2 - S1^2 / S0 of the values l .. r - 1

The best l never falls as r grows: it is found for r far apart first, then for those in their middles, where only what
lies between the neighbours' best is tried. That is n a halving and n log n a cluster. The compiled module does the same
to the same bits, but of many numbers a cluster it first rules out, by bounds on the cost, nearly all places where one
might begin (``csrc/core/clusters.cc``): where two partitions cost the same but for rounding, it may find the other one.
Sums are float64, in an order that depends on no thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewbit.core import compiled

POINTS = 1 << 14
"""Numbers of a table that are told apart as they are; of more, those that one float16 stands for count as one."""
PART = 1 << 18
"""Numbers of a table that are put into cells at a time."""
_TINY = torch.finfo(torch.float64).tiny
_FLOOR = 2.0**-48
"""What weighs less than that, next to the heaviest number of its table, is lost in the sums."""
CELLS = 0x7C00
"""How many float16 there are from 0 to the largest finite one."""


def centers(values: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """The ``count`` centers of least ``sum_i weights_i min_j (values_i - center_j)^2`` of every table, ascending.

    Args:
        values: (tables, n) finite, n > 0; within the range of float16 where n is above :data:`POINTS`.
        weights: (tables, n), non-negative; None where all count alike, as they do where all are zero. In other tables
            numbers that weigh nothing are left out.
        count: at least 1.

    Returns:
        float64 (tables, count). Where no more than ``count`` values differ, the last is repeated.

    Up to :data:`POINTS` numbers a table the optimum is exact, but for the rounding of float64 sums. Of more, a cut may
    only lie between float16 cells: each of the ``count - 1`` cuts, with centers ``gap`` apart and in a cell of width
    ``h <= max(2^-10 |x|, 2^-24)`` that weighs ``w``, then costs at most ``2 gap h w`` more than at its best.
    """
    native = compiled.grids()
    numbers = [values] if weights is None else [values, weights]
    if native is not None and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in numbers):
        (tables, n), found = values.shape, values.new_empty(len(values), count, dtype=torch.float64)
        given = [each.contiguous() for each in numbers]  # kept until the call ends
        v, w = (*(each.data_ptr() for each in given), 0)[:2]
        native.centers((tables, n, count, int(n > POINTS)), v, w, found.data_ptr())
        return found
    with _one_thread():
        worth = torch.ones((), dtype=values.dtype).expand_as(values) if weights is None else weights
        return torch.stack([_centers(*_points(v, w), count) for v, w in zip(values, worth, strict=True)])


@contextmanager
def _one_thread() -> Iterator[None]:
    """What follows is thousands of short calls: threads would wait for one another, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cells(half: Tensor) -> Tensor:
    """Finite float16 -> int32, in the same order and without gaps; both zeros are 0."""
    bits = half.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def of_cells(cells: Tensor) -> Tensor:
    """Inverse of :func:`cells`."""
    bits = torch.where(cells < 0, -cells - 0x8000, cells)
    return bits.to(torch.int16).view(torch.float16)


def _live(weights: Tensor) -> Tensor:
    """Float64, at most 1; ones where nothing weighs anything."""
    top = weights.amax().double()
    return weights.double() / top.clamp_min(_TINY) if bool(top > 0) else torch.ones_like(weights, dtype=torch.float64)


def _points(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (n,) that differ, float64 (most n,), ascending, and what each weighs in all."""
    live = _live(weights)
    values, live = values[live > 0], live[live > 0]
    if len(weights) > POINTS:
        return _cells(values, live)
    ordered, order = (values.double() + 0.0).sort(stable=True)
    at = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
    points = ordered.new_zeros(int(at[-1]) + 1)
    return points.scatter(0, at, ordered), torch.zeros_like(points).scatter_add_(0, at, live[order])


def _cells(values: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_points`, but of float16 cells: their weighted means."""
    mass, total = torch.zeros(2, 2 * CELLS + 1, dtype=torch.float64)
    for numbers, weights in zip(values.split(PART), live.split(PART), strict=True):
        at = (cells(numbers.half()) + CELLS).long()
        mass.index_add_(0, at, weights)
        total.index_add_(0, at, weights * numbers)
    present = mass > 0
    return total[present] / mass[present], mass[present]


def _centers(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """:func:`centers` of ascending float64 ``points`` (n,) that weigh ``mass``."""
    n = len(points)
    if n <= count:
        return torch.cat([points, points[-1:].expand(count - n)])
    pivot = points[n // 2]
    x = points - pivot
    unit = x.abs().amax().clamp_min(_TINY)
    x = x / unit
    s0, s1, s2 = (torch.nn.functional.pad(s.cumsum(0), (1, 0)) for s in (mass, mass * x, mass * x * x))
    return _means(x, mass, _begins(s0, s1, s2, count)) * unit + pivot


def _begins(s0: Tensor, s1: Tensor, s2: Tensor, count: int) -> Tensor:
    """Where the best clusters begin, (count,), of prefix sums (n + 1,)."""
    n = len(s0) - 1
    costs = [s2 - s1.square() / s0.clamp_min(_FLOOR)]
    for _ in range(2, count):
        costs.append(_layer(costs[-1] - s2, s0, s1) + s2)
    right = n
    begins = torch.zeros(count, dtype=torch.int64)
    for k in range(count - 1, 0, -1):
        apart, moment = s0[right] - s0[: right + 1], s1[right] - s1[: right + 1]
        total = (costs[k - 1] - s2)[: right + 1] - moment.square() / apart.clamp_min(_FLOOR)
        begins[k] = right = int(total.argmin())
    return begins


def _means(points: Tensor, mass: Tensor, begins: Tensor) -> Tensor:
    """Weighted means (count,) of ``points`` (n,) from each of ``begins`` on; where nothing lies, the point there."""
    owner = torch.zeros(len(points) + 1, dtype=torch.int64)
    owner = owner.scatter_add_(0, begins[1:], torch.ones_like(begins[1:])).cumsum(0)[:-1]
    none = torch.zeros(len(begins), dtype=torch.float64)
    weight = none.scatter_add(0, owner, mass)
    mean = none.scatter_add(0, owner, mass * points) / weight.clamp_min(_TINY)
    return torch.where(weight > 0, mean, points[begins.clamp_max(len(points) - 1)])


def _layer(before: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """``min over l <= r of before[l] - (s1[r] - s1[l])^2 / (s0[r] - s0[l])`` for every r: (n + 1,)."""
    size = len(before)
    best = torch.zeros(size, dtype=torch.int64)
    least = torch.empty_like(before)
    least[0] = before[0]
    stride = 1 << ((size - 1).bit_length() - 1)
    while stride:
        middles = torch.arange(stride, size, 2 * stride)
        right = best[2 * stride :: 2 * stride]
        if len(right) < len(middles):  # the last one's neighbour is not there: anything up to itself
            right = torch.cat([right, middles[-1:]])
        _halve(before, s0, s1, middles, right, least, best if stride > 1 else None)
        stride //= 2
    return least


def _halve(
    before: Tensor, s0: Tensor, s1: Tensor, middles: Tensor, right: Tensor, least: Tensor, best: Tensor | None
) -> None:
    """Write the entries ``middles`` (m,) of ``least``, and of ``best`` where it is asked for.

    ``right`` (m,): best l of each middle's neighbour on the right, which is that of the next one's on the left. So each
    l belongs to one middle; the last of them all belong to none. Those at borders are tried once more.
    """
    size, many = len(before), len(middles) + 1
    # owner: what repeat_interleave would say, in less time
    counts = torch.diff(right, prepend=right.new_zeros(1), append=right.new_full((1,), size))
    owner = torch.zeros(size, dtype=torch.int64).scatter_add_(0, right, torch.ones_like(right)).cumsum(0)
    ends = torch.nn.functional.pad(middles, (0, 1), value=size - 1)
    total, moment = (s[ends].index_select(0, owner).sub_(s) for s in (s0, s1))
    tried = moment.square_().div_(total.clamp_min_(_FLOOR)).neg_().add_(before)
    if bool((right > middles).any()):
        tried.masked_fill_(torch.arange(size) > ends.index_select(0, owner), torch.inf)
    low = torch.segment_reduce(tried, "min", lengths=counts, axis=0, initial=torch.inf, unsafe=True)
    border = torch.minimum(right, middles)
    moment, total = s1[middles] - s1[border], s0[middles] - s0[border]
    edge = before[border] - moment.square() / total.clamp_min(_FLOOR)
    inside = low[:-1]
    least[middles] = torch.minimum(inside, edge)
    if best is None:
        return
    hits = (tried == low.index_select(0, owner)).nonzero().squeeze(1)
    first = torch.zeros(many, dtype=torch.int64)
    first.scatter_reduce_(0, owner.index_select(0, hits), hits, "amin", include_self=False)
    best[middles] = torch.where(inside <= edge, first[:-1], border)
