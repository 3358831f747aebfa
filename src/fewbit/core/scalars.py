# SPDX-License-Identifier: Apache-2.0
"""Exact weighted k-means of numbers, by dynamic programming over sorted values (Wang and Song 2011, R Journal 3/2).

Clusters of numbers are intervals of the sorted values, and the cost of one comes from prefix sums of w, w x and w x^2::

    D[k][r] = min over l of D[k - 1][l] + cost(l, r)        cost = S2 - S1^2 / S0 of the values l .. r - 1

The best l never falls as r grows: it is found for r far apart first, then for those in their middles, where only what
lies between the neighbours' best is tried. That is n a halving and n log n a cluster; all tables, and all middles of a
halving, are computed together; the compiled module does one after the other, with the same bits. Sums are float64, in
an order that depends on no thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewbit.core import compiled

POINTS = 1 << 14
"""Numbers of a table that are told apart as they are; of more, those that one float16 stands for count as one."""
CHUNK = 1 << 17
"""Numbers clustered at a time: a megabyte of float64 each array."""
PART = 1 << 18
"""Numbers of a table that are put into cells at a time."""
_TINY = torch.finfo(torch.float64).tiny
_FLOOR = 2.0**-48
"""What weighs less than that, next to the heaviest number of its table, is lost in the sums."""
CELLS = 0x7C00
"""How many float16 there are from 0 to the largest finite one."""


def centers(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """The ``count`` centers of least ``sum_i weights_i min_j (values_i - center_j)^2`` of every table, ascending.

    Args:
        values: (tables, n) finite; within the range of float16 where n is above :data:`POINTS`.
        weights: (tables, n), non-negative. Where all are zero, all count alike.
        count: at least 1.

    Returns:
        float64 (tables, count). Where fewer than ``count`` values differ, some are repeated.

    Up to :data:`POINTS` numbers a table the optimum is exact, but for the rounding of float64 sums. Of more, a cut may
    only lie between float16 cells: each of the ``count - 1`` cuts, with centers ``gap`` apart and in a cell of width
    ``h <= max(2^-10 |x|, 2^-24)`` that weighs ``w``, then costs at most ``2 gap h w`` more than at its best.
    """
    step, parts = max(1, CHUNK // max(1, count // 16) // values.shape[1]), []
    with _one_thread():
        for v, w in zip(values.split(step), weights.split(step), strict=True):
            points, mass = _merged(v, w) if values.shape[1] <= POINTS else _cells(v, w)
            parts.append(_centers(points, mass, count))
    return torch.cat(parts)


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


def _live(weights: Tensor, top: Tensor) -> Tensor:
    """Float64, at most 1 in each table, whose largest is ``top``; ones where a table weighs nothing."""
    top = top.double()
    return torch.where(top > 0, weights.double() / top.clamp_min(_TINY), 1.0)


def _merged(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values that differ, float64 (tables, most that differ), ascending, and what each weighs in all. Rows that have
    fewer repeat their largest, weightless."""
    ordered, order = values.double().sort(1)
    at = torch.nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    points = ordered[:, -1:].repeat(1, int(at.max()) + 1).scatter_(1, at, ordered)
    mass = torch.zeros_like(points).scatter_add_(1, at, _live(weights, weights.amax(1, keepdim=True)).gather(1, order))
    return points, mass


def _cells(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_merged`, but of float16 cells: their weighted means."""
    points, masses = [], []
    for v, w in zip(values, weights, strict=True):
        mass, total = torch.zeros(2, 2 * CELLS + 1, dtype=torch.float64)
        top = w.amax()
        for numbers, weights_of in zip(v.split(PART), w.split(PART), strict=True):
            live, at = _live(weights_of, top), (cells(numbers.half()) + CELLS).long()
            mass.index_add_(0, at, live)
            total.index_add_(0, at, live.mul_(numbers))
        present = mass > 0
        points.append(total[present] / mass[present])
        masses.append(mass[present])
    most = max(map(len, points))
    pad = [(torch.cat([p, p[-1:].expand(most - len(p))]), torch.nn.functional.pad(m, (0, most - len(m))))
           for p, m in zip(points, masses, strict=True)]  # fmt: skip
    return torch.stack([p for p, _ in pad]), torch.stack([m for _, m in pad])


def _centers(points: Tensor, mass: Tensor, count: int) -> Tensor:
    """:func:`centers` of ascending float64 ``points`` (tables, n) that weigh ``mass``."""
    n = points.shape[1]
    if n <= count:
        return torch.cat([points, points[:, -1:].expand(-1, count - n)], 1)
    pivot = points[:, n // 2, None]
    x = points - pivot
    unit = x.abs().amax(1, keepdim=True).clamp_min(_TINY)
    x = x / unit
    s0, s1, s2 = (torch.nn.functional.pad(s.cumsum(1), (1, 0)) for s in (mass, mass * x, mass * x * x))
    begins = _begins(s0, s1, s2, count) if compiled.grids() is None else _compiled(s0, s1, s2, count)
    return _means(x, mass, begins) * unit + pivot


def _compiled(s0: Tensor, s1: Tensor, s2: Tensor, count: int) -> Tensor:
    """:func:`_begins`, the same to the bit, by the compiled module."""
    native = compiled.grids()
    assert native is not None
    (tables, size), sums = s0.shape, [s.contiguous() for s in (s0, s1, s2)]
    begins, best = torch.zeros(tables, count, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    scratch = torch.empty(count + 2, size, dtype=torch.float64)
    one, two, three = (s.data_ptr() for s in sums)
    native.clusters((tables, size, count), (one, two, three), begins.data_ptr(), best.data_ptr(), scratch.data_ptr())
    return begins


def _begins(s0: Tensor, s1: Tensor, s2: Tensor, count: int) -> Tensor:
    """Where the best clusters begin, (tables, count), of prefix sums (tables, n + 1)."""
    tables, n = s0.shape[0], s0.shape[1] - 1
    costs = [s2 - s1.square() / s0.clamp_min(_FLOOR)]
    for _ in range(2, count):
        costs.append(_layer(costs[-1] - s2, s0, s1) + s2)
    place, right = torch.arange(n + 1), torch.full((tables, 1), n)
    begins = torch.zeros(tables, count, dtype=torch.int64)
    for k in range(count - 1, 0, -1):
        apart, moment = s0.gather(1, right) - s0, s1.gather(1, right) - s1
        total = costs[k - 1] - s2 - moment.square() / apart.clamp_min(_FLOOR)
        right = torch.where(place > right, torch.inf, total).argmin(1, keepdim=True)
        begins[:, k, None] = right
    return begins


def _means(points: Tensor, mass: Tensor, begins: Tensor) -> Tensor:
    """Weighted means (tables, count) of ``points`` (tables, n) from each of ``begins`` on; where nothing weighs
    anything, or nothing lies, the point there."""
    marks = torch.zeros(points.shape[0], points.shape[1] + 1, dtype=torch.int64)
    owner = marks.scatter_add_(1, begins[:, 1:], torch.ones_like(begins[:, 1:])).cumsum(1)[:, :-1]
    none = torch.zeros(begins.shape, dtype=torch.float64)
    weight = none.scatter_add(1, owner, mass)
    mean = none.scatter_add(1, owner, mass * points) / weight.clamp_min(_TINY)
    return torch.where(weight > 0, mean, points.gather(1, begins.clamp_max(points.shape[1] - 1)))


def _layer(before: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
    """``min over l <= r of before[l] - (s1[r] - s1[l])^2 / (s0[r] - s0[l])`` for every r: (tables, n + 1)."""
    tables, size = before.shape
    best = torch.zeros(tables, size, dtype=torch.int64)
    least = torch.empty_like(before)
    least[:, 0] = before[:, 0]
    stride = 1 << ((size - 1).bit_length() - 1)
    while stride:
        middles = torch.arange(stride, size, 2 * stride)
        right = best[:, 2 * stride :: 2 * stride]
        if right.shape[1] < len(middles):  # the last one's neighbour is not there: anything up to itself
            right = torch.cat([right, middles[-1:].expand(tables, 1)], 1)
        _halve(before, s0, s1, middles, right, least, best if stride > 1 else None)
        stride //= 2
    return least


def _halve(
    before: Tensor, s0: Tensor, s1: Tensor, middles: Tensor, right: Tensor, least: Tensor, best: Tensor | None
) -> None:
    """Write the columns ``middles`` (m,) of ``least``, and of ``best`` where it is asked for.

    ``right`` (tables, m): best l of each middle's neighbour on the right, which is that of the next one's on the left.
    So each l belongs to one middle; the last of them all belong to none. Those at borders are tried once more.
    """
    (tables, size), many = before.shape, len(middles) + 1
    # owner: what repeat_interleave would say, in less time
    starts = torch.cat([right.new_zeros(tables, 1), right], 1)
    counts = torch.diff(starts, dim=1, append=right.new_full((tables, 1), size))
    starts = (starts + torch.arange(0, tables * size, size)[:, None]).flatten()
    marks = torch.zeros(tables * size, dtype=torch.int64)
    owner = marks.scatter_add_(0, starts[1:], torch.ones_like(starts[1:])).cumsum(0)
    ends = torch.nn.functional.pad(middles, (0, 1), value=size - 1)
    total, moment = (s[:, ends].flatten().index_select(0, owner).sub_(s.flatten()) for s in (s0, s1))
    tried = moment.square_().div_(total.clamp_min_(_FLOOR)).neg_().add_(before.flatten())
    if bool((right > middles).any()):
        later = torch.arange(size).repeat(tables) > ends.repeat(tables).index_select(0, owner)
        tried.masked_fill_(later, torch.inf)
    low = torch.segment_reduce(tried, "min", lengths=counts.flatten(), axis=0, initial=torch.inf, unsafe=True)
    border = torch.minimum(right, middles)
    moment, total = s1[:, middles] - s1.gather(1, border), s0[:, middles] - s0.gather(1, border)
    edge = before.gather(1, border) - moment.square() / total.clamp_min(_FLOOR)
    inside = low.reshape(tables, many)[:, :-1]
    least[:, middles] = torch.minimum(inside, edge)
    if best is None:
        return
    hits = (tried == low.index_select(0, owner)).nonzero().squeeze(1)
    first = torch.zeros(tables * many, dtype=torch.int64)
    first.scatter_reduce_(0, owner.index_select(0, hits), hits, "amin", include_self=False)
    place = (first % size).reshape(tables, many)[:, :-1]
    best[:, middles] = torch.where(inside <= edge, place, border)
