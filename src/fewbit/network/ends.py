# SPDX-License-Identifier: Apache-2.0
"""The two ends of a static grid of inputs, while they are learned.

With scale ``s = (high - low) / (levels - 1)``, zero ``z = round(-low / s)`` and c the code of x, x is rounded to ``x' =
s (c - z)``. Gradients go straight through both roundings, which is to say that what they add to c and z stands still
(Liu et al. 2024, arXiv:2406.06649, whose grids have no z)::

    within the ends    dx'/dx = 1    dx'/ds = (x' - x) / s
    beyond             dx'/dx = 0    dx'/ds = (x' - low) / s    and 1 by low itself

A symmetric grid has ``s = 2 max(-low, high) / (levels - 1)`` and a fixed z; beyond its ends dx'/ds = x' / s, and that
is all.
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
        ctx.symmetric, ctx.top, ctx.scale = grid.symmetric, bound.levels - 1, bound.scale
        ctx.deeper, ctx.base = bool(-low > high), 0.0 if grid.symmetric else float(low)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (grad,) = gradients
        x, place, rounded = ctx.saved_tensors
        inside = (place >= 0) & (place <= ctx.top)
        within = torch.where(inside, grad, 0.0)
        by_scale = (torch.where(inside, rounded - x, rounded - ctx.base) * grad).sum(dtype=torch.float64) / ctx.scale
        if ctx.symmetric:
            by_end, none = 2 * by_scale / ctx.top, torch.zeros_like(by_scale)
            return within, *((-by_end, none) if ctx.deeper else (none, by_end)), None
        by_high = by_scale / ctx.top
        return within, (grad - within).sum(dtype=torch.float64) - by_high, by_high, None
