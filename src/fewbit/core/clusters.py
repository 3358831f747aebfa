# SPDX-License-Identifier: Apache-2.0
"""Weighted clustering of vectors: seeded k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

All sums are float64, in an order that depends on no thread: the same points and seed give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Distances that are held at a time: 2 MiB of float64."""
POINTS = 32
"""Points a centroid that a fit looks at, at least."""
DISTANCES = 1 << 23
"""A fit looks at more points as long as it measures no more distances a round: with 8 bits 128 points a centroid, of
which 32 lose up to a tenth more; with 12 bits 32, as more would take minutes."""
ROUNDS = 25
SPARE = 2.0**-40
"""What a point weighs that shall have a centroid where one is left over, and move none."""


def sample(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most ``POINTS * count``, or ``DISTANCES / count`` where that is more, of ``points`` (n, dim) that weigh
    something, drawn without replacement, and their ``weights`` (n,); both float64. Where nothing weighs anything, all
    count alike."""
    present = weights > 0
    if not bool(present.any()):
        weights = torch.ones_like(weights)
    elif not bool(present.all()):
        points, weights = points[present], weights[present]
    most = max(POINTS * count, DISTANCES // count)
    if len(points) > most:
        drawn = torch.randperm(len(points), generator=generator)[:most].sort().values
        points, weights = points[drawn], weights[drawn]
    return points.double(), weights.double()


def nearest(points: Tensor, centroids: Tensor, worth: Tensor | None = None) -> Tensor:
    """Index (n,) int64 of the centroid (count, dim) nearest to each of ``points`` (n, dim), the lowest of equal ones.

    By ``|c|^2 / 2 - x c`` in float64: which is nearest is exact where distances differ by more than about 2^-50 |c|^2.
    ``worth``: (n, dim), what each square in a distance counts; None for 1.
    """
    step = max(1, (CHUNK if points.device.type == "cpu" else CHUNK << 8) // len(centroids))
    if worth is not None:
        pairs = zip(points.split(step), worth.split(step), strict=True)
        return torch.cat([weighed(part, centroids, own).argmin(1) for part, own in pairs])
    centroids = centroids.double()
    half, across = centroids.square().sum(1) / 2, centroids.T.contiguous()
    parts = [torch.addmm(half, part.double(), across, alpha=-1).argmin(1) for part in points.split(step)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=points.device)


def weighed(points: Tensor, centroids: Tensor, worth: Tensor) -> Tensor:
    """``sum_d worth_d (c_d^2 / 2 - x_d c_d)`` of every point and centroid, (n, count): see :func:`nearest`."""
    wide, own = centroids.double(), worth.double()
    return torch.cat([own, own * points.double()], 1) @ torch.cat([wide.square() / 2, -wide], 1).T


def means(points: Tensor, weights: Tensor, count: int, generator: torch.Generator, rounds: int = ROUNDS) -> Tensor:
    """``count`` centroids of float64 ``points`` (n, dim), n > 0, with positive ``weights`` (n,): float64 (count, dim).

    Lloyd's iterations end when no point moves, or after ``rounds``. A centroid that has lost its points goes to the
    point that costs most. Where fewer than ``count`` points differ, they are the centroids, and the first is repeated.
    """
    chosen = _seeds(points, weights, count, generator)
    centroids = points[chosen]
    if len(chosen) < count:
        return torch.cat([centroids, centroids[:1].expand(count - len(chosen), -1)])
    owner = nearest(points, centroids)
    for _ in range(rounds):
        centroids = _means_of(points, weights, owner, centroids)
        before, owner = owner, nearest(points, centroids)
        if torch.equal(before, owner):
            break
    return centroids


def best_means(points: Tensor, weights: Tensor, count: int, generator: torch.Generator, restarts: int) -> Tensor:
    """:func:`means` of ``restarts`` starts, those of least ``sum weight |point - nearest|^2``, the first of equal."""
    best, least = means(points, weights, count, generator), float("inf")
    for start in range(restarts if restarts > 1 else 0):
        found = means(points, weights, count, generator) if start else best
        lost = float((weights * (points - found[nearest(points, found)]).square().sum(1)).sum())
        if lost < least:
            best, least = found, lost
    return best


def _seeds(points: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (at most count,) of starting points: each is drawn with a chance in proportion to its weight times its
    squared distance from those drawn before. Ends when nothing is left that differs."""
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    chosen: list[int] = []
    chance, distance = weights, torch.full_like(weights, torch.inf)
    for draw in drawn:
        up_to = chance.cumsum(0)
        if not float(up_to[-1]) > 0:
            break
        last = torch.searchsorted(up_to, draw * up_to[-1], right=True)
        chosen.append(min(int(last), len(points) - 1))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
        chance = weights * distance
    return torch.tensor(chosen)


def _means_of(points: Tensor, weights: Tensor, owner: Tensor, centroids: Tensor) -> Tensor:
    """Weighted means (count, dim) of the points that each centroid owns."""
    count = len(centroids)
    mass = torch.bincount(owner, weights, count)
    sums = [torch.bincount(owner, weights * column, count) for column in points.T.contiguous()]
    moved = torch.where(mass[:, None] > 0, torch.stack(sums, 1) / mass.clamp_min(1e-300)[:, None], centroids)
    idle = (mass == 0).nonzero().squeeze(1)
    if len(idle):
        cost = weights * (points - moved[owner]).square().sum(1)
        costly = cost.argsort(descending=True, stable=True)[: len(idle)]
        moved[idle[: len(costly)]] = points[costly]
    return moved
