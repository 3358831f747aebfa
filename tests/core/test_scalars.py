# SPDX-License-Identifier: Apache-2.0
"""Exact k-means of numbers against every partition, by enumeration or a plain dynamic program, and against the
Lloyd-Max quantizers of a Gaussian."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fewbit.core import compiled, scalars

LLOYD_MAX = {2: 0.3634, 3: 0.1902, 4: 0.1175, 5: 0.0799, 8: 0.03455, 16: 0.00950, 32: 0.00251}
"""Mean square error of the best quantizers of a unit Gaussian, by number of levels (Max 1960, table I)."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def least_cost(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    """Over all cuts of the sorted values into ``count`` runs."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    costs = []
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        cost = 0.0
        for v, w in zip(np.split(values, cuts), np.split(weights, cuts), strict=True):
            if w.sum() > 0:
                cost += float((w * (v - (w * v).sum() / w.sum()) ** 2).sum())
        costs.append(cost)
    return min(costs)


def cost_of(values: torch.Tensor, weights: torch.Tensor, centers: torch.Tensor) -> np.ndarray:
    """(tables,) float64, each value to the center nearest to it."""
    v, c = values.double().numpy(), centers.numpy()
    found: np.ndarray = (weights.double().numpy() * ((v[..., None] - c[:, None]) ** 2).min(-1)).sum(-1)
    return found


@pytest.mark.parametrize(("n", "count"), [(9, 3), (12, 4), (12, 2), (10, 7), (13, 1), (11, 5), (5, 5), (8, 7)])
def test_no_partition_costs_less(n: int, count: int) -> None:
    values, weights = normal(24, n, seed=n), normal(24, n, seed=n + 1).square()
    values[1], values[2] = values[1].round(), 0.3
    values[3, 0], values[4, 1] = 300.0, -300.0
    weights[::4] *= normal(6, n, seed=count) > 0.4
    weights[5] = 0
    centers = scalars.centers(values, weights, count)
    assert centers.shape == (24, count) and bool((centers.diff(dim=1) >= 0).all())
    found = cost_of(values, torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0), centers)
    for table in range(24):
        w = weights[table].double().numpy()
        least = least_cost(values[table].double().numpy(), w if w.any() else np.ones(n), count)
        assert found[table] <= least + 1e-11 * float((w * values[table].double().numpy() ** 2).sum() + 1)


def test_values_that_are_fewer_than_the_levels_are_kept() -> None:
    values = torch.tensor([[3.0, -1, 3, 7], [2, 2, 2, 2], [1, 2, 3, 4]])
    assert set(scalars.centers(values, torch.ones(3, 4), 4)[0].tolist()) == {-1.0, 3.0, 7.0}
    found = scalars.centers(values, torch.ones(3, 4), 3)
    assert found[0].tolist() == [-1, 3, 7] and found[1].tolist() == [2, 2, 2]
    assert scalars.centers(values, torch.ones(3, 4), 6).shape == (3, 6)


@pytest.mark.parametrize("count", LLOYD_MAX)
def test_levels_of_a_gaussian_are_those_of_lloyd_and_max(count: int) -> None:
    values = normal(1, 1_000_000)
    centers = scalars.centers(values, torch.ones_like(values), count)[0]
    nearest = torch.bucketize(values[0].double(), (centers[1:] + centers[:-1]) / 2)
    error = float((values[0].double() - centers[nearest]).square().mean())
    # the optimum of n samples lies below that of the distribution, by about count / n of it
    assert error == pytest.approx(LLOYD_MAX[count], rel=0.01)


def test_cells_cost_no_more_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = normal(3, 3000), normal(3, 3000, seed=1).square()
    exact = scalars.centers(values, weights, 8)
    monkeypatch.setattr(scalars, "POINTS", 100)
    rough = scalars.centers(values, weights, 8)
    assert not torch.equal(rough, exact)
    more = cost_of(values, weights, rough) - cost_of(values, weights, exact)
    for table in range(3):
        cuts = (exact[table, 1:] + exact[table, :-1]) / 2
        width = (cuts.abs() * 2.0**-10).clamp_min(2.0**-24)
        near = (values[table].double()[:, None] - cuts).abs() <= width
        mass = (weights[table].double()[:, None] * near).sum(0)
        assert -1e-9 <= more[table] <= float((2 * exact[table].diff() * width * mass).sum())


def test_float16_cells_are_in_order_without_gaps() -> None:
    every = torch.arange(-31743, 31744, dtype=torch.int32)
    values = scalars.of_cells(every)
    assert bool(values.isfinite().all()) and bool((values.float().diff() > 0).all())
    assert torch.equal(scalars.cells(values), every)
    assert int(scalars.cells(torch.tensor([-0.0], dtype=torch.float16))) == 0


def test_the_bits_depend_on_no_thread_and_no_neighbour() -> None:
    values, weights = normal(40, 300), normal(40, 300, seed=1).square()
    values[7], weights[9] = values[7].round(), 0  # of fewer values, and of all that weigh the same
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(scalars.centers(values, weights, 8))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    alone = [scalars.centers(v, w, 8) for v, w in zip(values.split(1), weights.split(1), strict=True)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], torch.cat(alone))


def test_without_weights_all_count_alike() -> None:
    values = normal(3, 500)
    assert torch.equal(scalars.centers(values, None, 8), scalars.centers(values, torch.full_like(values, 0.25), 8))
    assert torch.equal(scalars.centers(values, None, 8), scalars.centers(values, torch.zeros_like(values), 8))


def test_what_weighs_nothing_does_not_count() -> None:
    values, weights = normal(1, 300), (normal(1, 300, seed=1) > 0).float()
    there = values[weights > 0][None]
    assert torch.equal(scalars.centers(values, weights, 8), scalars.centers(there, None, 8))
    assert torch.equal(scalars.centers(values.double(), weights.double(), 8), scalars.centers(there, None, 8))


SHAPES: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "plain": lambda x, y: (x, torch.ones_like(x)),
    "few values": lambda x, y: ((x * 32).round() / 32, (y > 0).float()),
    "far ones": lambda x, y: (torch.where(x.abs() > 2.5, x * 100, x), torch.ones_like(x)),
    "heavy ones": lambda x, y: (x, y.square().square() * torch.exp(4 * x)),
    "clumps": lambda x, y: (torch.floor(4 * x) + 1e-3 * y, torch.ones_like(x)),
    "decades": lambda x, y: (x.sign() * 10 ** (-6 * torch.rand_like(x)), y.square()),
}
"""Values and weights of normal numbers x, y."""


def cost_of_the_best(values: torch.Tensor, weights: torch.Tensor, count: int) -> float:
    """By D[k][r] = min over all l of D[k - 1][l] + cost(l, r), costs in long doubles."""
    order = values.argsort()
    v, w = (each[order].double().numpy().astype(np.longdouble) for each in (values, weights))
    s0, s1, s2 = (np.concatenate([[0], s.cumsum()]) for s in (w, w * v, w * v * v))
    mass, moment = s0[None] - s0[:, None], s1[None] - s1[:, None]
    costs = s2[None] - s2[:, None] - moment**2 / np.where(mass > 0, mass, 1)
    costs = np.where(np.tri(len(costs), k=-1, dtype=bool), np.inf, costs)
    least = costs[0]
    for _ in range(1, count):
        least = (least[:, None] + costs).min(0)
    return float(least[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "count", "tables"), [(280, 4, 100), (700, 8, 1), (1100, 16, 1), (700, 16, 1)])
def test_no_partition_of_many_numbers_costs_less(n: int, count: int, tables: int, shape: str) -> None:
    """Also where there are so many numbers a cluster that the compiled module rules places out: credits that are
    too small show in one table of a hundred."""
    torch.manual_seed(n)
    values, weights = SHAPES[shape](normal(tables, n, seed=n), normal(tables, n, seed=count))
    found = cost_of(values, weights, scalars.centers(values, weights, count))
    scale = (weights.double() * values.double().square()).sum(1)
    for table in range(tables):
        assert found[table] <= cost_of_the_best(values[table], weights[table], count) + 1e-11 * float(scale[table])


@pytest.mark.skipif(compiled.grids() is None, reason="the compiled module is absent")
@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "counts"), [(64, (1, 2, 3, 63)), (1000, (2, 15)), (5000, (4, 16))])
def test_the_compiled_module_has_the_same_bits(
    n: int, counts: tuple[int, ...], shape: str, cells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numbers and of float16 cells, also where many are equal, and where some weigh nothing."""
    torch.manual_seed(n)
    values, weights = SHAPES[shape](normal(2, n, seed=n), normal(2, n, seed=n + 1))
    monkeypatch.setattr(scalars, "POINTS", 10 if cells else n)
    for count in counts:
        made = scalars.centers(values, weights, count)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "grids", lambda: None)
            assert torch.equal(scalars.centers(values, weights, count), made)
