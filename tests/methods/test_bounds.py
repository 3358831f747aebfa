# SPDX-License-Identifier: Apache-2.0
"""Learned ranges: that all they change is where grids begin and end, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core import format as F
from fewbit.methods.bounds import MOST, Bounds

FORMATS = ("int2/channel/asym", "int3/g8/min", "int4/g8/sym")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learner(spelling: str, weight: Tensor) -> Bounds:
    return Bounds(weight, methods.rtn(weight, formats.parse(spelling)))


@pytest.mark.parametrize("spelling", FORMATS)
def test_it_starts_from_what_is_stored_and_freezes_what_it_shows(spelling: str) -> None:
    weight = normal(4, 16)
    start = methods.clip(weight, formats.parse(spelling))
    made = Bounds(weight, start)
    assert set(made.start) == {"low", "high"}
    assert torch.equal(made.weight(made.start), start.dequantize())
    assert torch.equal(made.freeze(made.start).dequantize(), start.dequantize())
    moved = {name: value * factor for (name, value), factor in zip(made.start.items(), (1.3, 0.7), strict=True)}
    end = made.freeze(moved)
    assert torch.equal(made.weight(moved), end.dequantize()) and not torch.equal(end.packed, start.packed)
    assert torch.equal(F.encode(end.format, weight, end.logical()[1]), end.packed), "nearest values of the new grid"
    assert all(low == 0 and high == MOST > 1 for low, high in made.bounds.values())


@pytest.mark.parametrize("beyond", [0.6, 1.4])
def test_the_gradient_is_a_difference_with_rounding_held_still(beyond: float) -> None:
    """Of a float minimum: with e what rounding added to the codes, w = s (clip((W - lo) / s) + e) + lo."""
    weight, outer = normal(2, 8), normal(2, 8, seed=1)
    made = learner("int3/g8/min", weight)
    values = {name: torch.full_like(value, beyond) for name, value in made.start.items()}
    found = made.gradient(values, outer)
    for row in range(2):
        w, g = weight[row].double().numpy(), outer[row].double().numpy()
        first = made.freeze(made.start).logical()[1]
        low = float(first["minimum"][row, 0, 0])
        high = low + 7 * float(first["scale"][row, 0, 0])

        def ends(beta: float, gamma: float, low: float = low, high: float = high) -> tuple[float, float]:
            return beta * low, (gamma * high - beta * low) / 7

        lo, s = ends(beyond, beyond)
        place = (w - lo) / s
        added = np.round(np.clip(place, 0, 7)) - np.clip(place, 0, 7)

        def loss(beta: float, gamma: float, w: np.ndarray = w, g: np.ndarray = g, added: np.ndarray = added) -> float:
            lo, s = ends(beta, gamma)
            return float(g @ (s * (np.clip((w - lo) / s, 0, 7) + added) + lo))

        for name, step in (("low", (1e-6, 0.0)), ("high", (0.0, 1e-6))):
            up, down = (loss(beyond + sign * step[0], beyond + sign * step[1]) for sign in (1, -1))
            # scale and minimum are stored in float16, and codes within half a step of an end count as inside
            assert float(found[name][row, 0, 0]) == pytest.approx((up - down) / 2e-6, rel=0.02, abs=0.05)


def test_what_has_no_ends_is_refused() -> None:
    assert methods.tuning("bounds").refuse(formats.parse("palette4"))
    assert methods.tuning("bounds").refuse(formats.parse("int2/channel/asym")) is None
