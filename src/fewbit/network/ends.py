# SPDX-License-Identifier: Apache-2.0
"""The two ends of a static grid of inputs, while they are learned.

With scale ``s = (high - low) / (levels - 1)``, zero ``z = round(-low / s)`` and c the code of x, a number is rounded to
``s (c - z)``. Gradients go straight through both roundings; of the ends they are, x' being what x is rounded to::

    low <= x <= high    (x' - x) / (high - low) by high, the negative of that by low
    x < low             1 by low
    x > high            1 by high

A symmetric grid has ``s = 2 max(-low, high) / (levels - 1)`` and a fixed z: its deeper end takes ``2 / (levels - 1)``
times the gradient of s, which is (x' - x) / s inside and c - z beyond (Liu et al. 2024, arXiv:2406.06649, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbit.formats.fixed import Fixed

FAR = 1.0
"""Ranges by which an end may move, at most."""


class Ends:
    """``low`` and ``high`` are float64 numbers, how far each end has moved, in units of the range where it began; they
    start at 0, where the grid is ``grid``. An end never crosses 0."""

    def __init__(self, grid: Fixed) -> None:
        self._grid, top = grid, grid.levels - 1
        zero = top / 2 if grid.symmetric else grid.zero
        self._from = {"low": -grid.scale * zero, "high": grid.scale * (top - zero)}
        self._unit = grid.scale * top
        self.start = {name: torch.zeros((), dtype=torch.float64) for name in self._from}
        low, high = (end / self._unit for end in self._from.values())
        self.bounds = {"low": (-FAR, -low), "high": (-high, FAR)}

    def round(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``x`` rounded to the grid of these ends, with gradients by all three."""
        moved = (self._from[name] + value * self._unit for name, value in (("low", low), ("high", high)))
        rounded: Tensor = _Round.apply(x, *moved, self._grid)  # type: ignore[no-untyped-call]
        return rounded

    def freeze(self, low: Tensor, high: Tensor) -> Fixed:
        """The grid that :meth:`round` rounds to."""
        ends = {"low": float(low), "high": float(high)}
        return self._grid.at(*(self._from[name] + value * self._unit for name, value in ends.items()))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, grid: Fixed) -> Tensor:
        bound = grid.at(float(low), float(high))
        place = x / bound.scale + bound.zero
        rounded = (place.round().clamp_(0, bound.levels - 1) - bound.zero) * bound.scale
        ctx.save_for_backward(x, place, rounded)
        ctx.grid, ctx.deeper = bound, bool(-low > high)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grad,) = gradients
        x, place, rounded = ctx.saved_tensors
        grid: Fixed = ctx.grid
        top = grid.levels - 1
        inside = (place >= 0) & (place <= top)
        within = torch.where(inside, grad, 0.0)
        by_scale = ((rounded - x) * within).sum(dtype=torch.float64) / grid.scale
        if grid.symmetric:
            beyond = ((grad - within) * rounded).sum(dtype=torch.float64) / grid.scale
            by_end = 2 * (by_scale + beyond) / top
            low, high = (-by_end, torch.zeros_like(by_end)) if ctx.deeper else (torch.zeros_like(by_end), by_end)
        else:
            low = torch.where(place < 0, grad, 0.0).sum(dtype=torch.float64) - by_scale / top
            high = torch.where(place > top, grad, 0.0).sum(dtype=torch.float64) + by_scale / top
        return within, low, high, None
