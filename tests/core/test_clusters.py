# SPDX-License-Identifier: Apache-2.0
"""k-means against a slow float64 twin that is written here, and what it does where points are few or weigh nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.core import clusters


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_nearest(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    found = []
    for point in points:
        distances = [float(((point - centroid) ** 2).sum()) for centroid in centroids]
        found.append(distances.index(min(distances)))
    return np.array(found)


def slow_means(points: np.ndarray, weights: np.ndarray, count: int, draws: np.ndarray) -> np.ndarray:
    """The algorithm of the module's docstring, point by point."""
    centroids: list[np.ndarray] = []
    for draw in draws:
        chance = [
            weight * min([1.0] if not centroids else [float(((point - c) ** 2).sum()) for c in centroids])
            for point, weight in zip(points, weights, strict=True)
        ]
        target, running = draw * sum(chance), 0.0
        for point, share in zip(points, chance, strict=True):
            running += share
            if running > target:
                centroids.append(point)
                break
    assert len(centroids) == count
    means, owner = np.array(centroids), slow_nearest(points, np.array(centroids))
    for _ in range(clusters.ROUNDS):
        moved = means.copy()
        for c in range(count):
            if weights[owner == c].sum() > 0:
                moved[c] = (weights[owner == c, None] * points[owner == c]).sum(0) / weights[owner == c].sum()
        cost = weights * ((points - moved[owner]) ** 2).sum(1)
        idle = [c for c in range(count) if not (owner == c).any()]
        for c, worst in zip(idle, np.argsort(-cost, kind="stable")[: len(idle)], strict=True):
            moved[c] = points[worst]
        means, before, owner = moved, owner, slow_nearest(points, moved)
        if (before == owner).all():
            break
    return means


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("n", "dim", "count"), [(40, 2, 5), (60, 3, 16), (33, 8, 30)])
def test_means_are_those_of_the_slow_twin(n: int, dim: int, count: int, seed: int) -> None:
    points = torch.randn(n, dim, generator=generator(seed), dtype=torch.float64)
    weights = torch.rand(n, generator=generator(seed + 100), dtype=torch.float64) + 0.1
    draws = torch.rand(count, generator=generator(seed), dtype=torch.float64)
    expected = slow_means(points.numpy(), weights.numpy(), count, draws.numpy())
    found = clusters.means(points, weights, count, generator(seed))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_nearest_is_the_lowest_of_equals() -> None:
    centroids = torch.tensor([[0.0, 1], [2, 0], [2, 0], [0, 1]])
    assert clusters.nearest(torch.tensor([[0.0, 1], [2, 0], [3, 0]]), centroids).tolist() == [0, 1, 1]
    assert clusters.nearest(torch.empty(0, 2), centroids).shape == (0,)


def test_nearest_in_parts_is_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = torch.randn(101, 4, generator=generator()), torch.randn(16, 4, generator=generator(1))
    expected = slow_nearest(points.double().numpy(), centroids.double().numpy())
    monkeypatch.setattr(clusters, "CHUNK", 48)
    assert np.array_equal(clusters.nearest(points, centroids).numpy(), expected)


def test_fewer_points_than_centroids_are_kept_as_they_are() -> None:
    points = torch.tensor([[1.0, 2], [1, 2], [-3, 4]], dtype=torch.float64)
    found = clusters.means(points, torch.ones(3, dtype=torch.float64), 8, generator())
    assert found.shape == (8, 2)
    assert {tuple(row) for row in found.tolist()} == {(1.0, 2.0), (-3.0, 4.0)}


def test_a_sample_leaves_out_what_weighs_nothing() -> None:
    points, weights = torch.arange(20.0).reshape(10, 2), torch.tensor([0.0, 1] * 5)
    few, shares = clusters.sample(points, weights, 1, generator())
    assert few.tolist() == points[1::2].tolist() and shares.tolist() == [1.0] * 5
    every, shares = clusters.sample(points, torch.zeros(10), 1, generator())
    assert every.tolist() == points.tolist() and shares.tolist() == [1.0] * 10


def test_a_large_sample_is_drawn_without_replacement_and_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = torch.arange(1000.0)[:, None], torch.ones(1000)
    assert len(clusters.sample(points, weights, 4, generator())[0]) == len(points), "so few distances"
    monkeypatch.setattr(clusters, "DISTANCES", 4 * 5 * clusters.POINTS * 4)
    assert len(clusters.sample(points, weights, 4, generator())[0]) == 5 * clusters.POINTS * 4
    monkeypatch.setattr(clusters, "DISTANCES", 1)
    few = clusters.sample(points, weights, 4, generator())[0].squeeze(1)
    assert len(few) == 4 * clusters.POINTS == len(set(few.tolist()))
    assert torch.equal(few, clusters.sample(points, weights, 4, generator())[0].squeeze(1))
    assert not torch.equal(few, clusters.sample(points, weights, 4, generator(1))[0].squeeze(1))


def test_the_bits_depend_on_no_thread() -> None:
    points = torch.randn(20000, 8, generator=generator(), dtype=torch.float64)
    weights = torch.rand(20000, generator=generator(1), dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(clusters.means(points, weights, 64, generator()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_centroid_without_points_goes_to_the_costliest_one() -> None:
    points = torch.tensor([[0.0], [2], [10], [30]], dtype=torch.float64)
    owner, weights = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1, 1, 3], dtype=torch.float64)
    moved = clusters._means_of(points, weights, owner, torch.zeros(3, 1, dtype=torch.float64))
    assert moved.squeeze(1).tolist() == [1.0, 25.0, 10.0]  # costs 1, 1, 225, 75
