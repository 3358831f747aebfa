# SPDX-License-Identifier: Apache-2.0
"""Search of the range of every block: which parameters lose least under importance weights.

A block fitted as if it were ``ratio * block`` has a narrower grid: finer inside, clipped outside. Every ratio of a
grid is tried on every span (the columns whose parameters must be fitted together) and the one of least
``sum_i importance_i (w_i - w_hat_i)^2`` is kept; what plain rounding would use is among the candidates and wins ties.

Of grids around zero with an even number of levels one side has a level more than the other. Plain rounding fits the
shorter one; here the largest weight of the block is on the longer, to which the sign of the scale turns it, and a
ratio of 1 puts it right on the last level: a step is ``max|w| / 2^(b-1)``, not ``max|w| / (2^(b-1) - 1/2)``. (So do
llama.cpp's symmetric types, and auto-round.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format, Params
from fewbit.errors import SpecError
from fewbit.methods import grids

CHUNK = 1 << 17
"""Weights searched at a time: the candidates' temporaries stay in the cache, and calls are not too many."""


def grid(steps: int, floor: float) -> tuple[float, ...]:
    """``steps`` ratios, evenly spaced from 1 down to ``floor``.

    Raises:
        SpecError: fewer than two steps, or a floor outside (0, 1).
    """
    if steps < 2 or not 0 < floor < 1:
        raise SpecError(
            f"clipping search of {steps} steps down to {floor}",
            "it needs at least 2 steps and a floor between 0 and 1",
            "for example steps=24 and floor=0.4",
        )
    return tuple(1 - (1 - floor) * i / (steps - 1) for i in range(steps))


def search(format: Format, weight: Tensor, importance: Tensor | None, ratios: tuple[float, ...]) -> dict[str, Tensor]:
    """Parameters (rows, blocks, 1) of ``weight`` (rows, columns), decided span by span.

    Args:
        format: already bound.
        weight: float32.
        importance: (columns,), non-negative; None is one everywhere.
        ratios: shrinking factors to try besides the plain fit.
    """
    if not ratios:
        return F.fit(format, weight)
    if format.best_fit:
        return _weighted(format, weight, importance)
    if format.plain is not None:
        found = format.of_plain(search(format.plain, weight, importance, ratios))
        worth = torch.ones(weight.shape[1]) if importance is None else importance
        return _better(format, weight, worth, F.fit(format, weight), found)
    if format.whole:
        return _of_whole(format, weight, importance, ratios)
    columns = weight.shape[1]
    even = torch.ones(columns) if importance is None else importance
    if (compiled := grids.search(format, weight.float(), even, ratios)) is not None:
        return compiled
    mask = B.present(columns, format.block, weight.device)
    worth = mask if importance is None else B.split(importance.float().reshape(1, -1), format.block)

    def choose(blocks: Tensor) -> Params:
        found = grids.search_table(format, blocks, worth, ratios)
        return _search(format, blocks, mask, worth, ratios) if found is None else found

    return by_strips(format, weight, choose)


def strips(rows: int, columns: int, device: str = "cpu") -> list[slice]:
    """Rows at a time, about :data:`CHUNK` weights; all of them on a GPU, where starting an operation costs most."""
    step = max(1, CHUNK // columns if device == "cpu" else rows)
    return [slice(first, first + step) for first in range(0, rows, step)]


def by_strips(format: Format, weight: Tensor, choose: Callable[[Tensor], Params]) -> dict[str, Tensor]:
    """What ``choose`` finds for the float32 blocks (rows, blocks, block) of a strip of ``weight``, for all strips."""
    cuts = [slice(0, len(weight))] if format.whole else strips(*weight.shape)
    parts = [choose(B.split(weight[rows].float(), format.block)) for rows in cuts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _weighted(format: Format, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
    """The format's own fit under ``importance``."""
    plain = F.fit(format, weight)
    return (
        plain if importance is None else _better(format, weight, importance, plain, F.fit(format, weight, importance))
    )


def _of_whole(
    format: Format, weight: Tensor, importance: Tensor | None, ratios: tuple[float, ...]
) -> dict[str, Tensor]:
    """One grid for all rows, fitted to all of ``weight`` times the best of ``ratios``."""
    worth = torch.ones(weight.shape[1]) if importance is None else importance
    best = F.fit(format, weight)
    for ratio in ratios:
        best = _better(format, weight, worth, best, F.fit(format, weight * ratio))
    return best


def _better(
    format: Format, weight: Tensor, importance: Tensor, plain: dict[str, Tensor], best: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``best``, but in groups of rows where that loses more than ``plain`` (which only rounding of parameters can bring
    about), the latter."""
    rows = len(weight)
    each = format.group_rows or rows
    lost = []
    for params in (plain, best):
        error = F.decode(format, F.encode(format, weight, params), params).sub_(weight)
        errors = error.square_().mul_(importance).sum(1, dtype=torch.float64)
        errors = torch.constant_pad_nd(errors, (0, -rows % each)).reshape(-1, each).sum(1)
        lost.append(errors.repeat_interleave(each)[:rows])
    better = lost[1] < lost[0]
    if bool(better.all()) or not bool(better.any()):
        return best if bool(better.all()) else plain
    return {name: torch.where(better.view(-1, *[1] * (v.ndim - 1)), best[name], v) for name, v in plain.items()}


def _search(
    format: Format, blocks: Tensor, mask: Tensor, worth: Tensor, ratios: tuple[float, ...]
) -> dict[str, Tensor]:
    """:func:`search` on some rows: ``blocks`` (rows, blocks, block), ``mask`` and ``worth`` (1, blocks, block)."""
    best = dict(format.fit(blocks, mask))
    least = _span_errors(format, blocks, worth, best)
    full = full_range(format, blocks) if format.grid == "magnitude" else None
    shrunk, among = (_ends(blocks, worth), mask.new_ones(1)) if format.grid == "ends" else (blocks, worth)
    for ratio in ratios:
        params = format.fit(shrunk * ratio, among) if full is None else format.placed(full * ratio, 0 * full)
        best, least = lesser(format, best, least, params, _span_errors(format, blocks, worth, params))
    return best


def lesser(
    format: Format, best: dict[str, Tensor], least: Tensor, params: Params, errors: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Span by span, what loses less: ``best``, by ``least`` (rows, spans), which wins ties, or ``params``, by
    ``errors``; and how much that is."""
    better, blocks = errors < least, next(iter(best.values())).shape[1]
    chosen = B.per_block(better.unsqueeze(-1), blocks, span_blocks(format, blocks))
    found = {name: torch.where(chosen, params[name], values) for name, values in best.items()}
    return found, torch.where(better, errors, least)


def _ends(blocks: Tensor, worth: Tensor) -> Tensor:
    """Least and largest of each of ``blocks`` (rows, blocks, block), as (rows, blocks, 2): all that a grid between two
    ends is fitted to. Zeros without ``worth``, such as padding, are no ends, unless there is nothing else."""
    there = (worth > 0) | (blocks != 0)
    there = there | ~there.any(-1, keepdim=True)
    low, high = torch.where(there, blocks, torch.inf), torch.where(there, blocks, -torch.inf)
    return torch.cat([low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)], -1)


def full_range(format: Format, blocks: Tensor) -> Tensor:
    """The scale, negative where it has to be, of the grid around zero on whose last level the largest weight of each of
    ``blocks`` (rows, blocks, block) lies: (rows, blocks, 1)."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) * (-2 / format.levels)


def _span_errors(format: Format, blocks: Tensor, worth: Tensor, params: Params) -> Tensor:
    """Weighted squared error of every span, (rows, spans)."""
    errors = _halved(format.nearest(blocks, params)[1].sub_(blocks).square_().mul_(worth))
    repeat = span_blocks(format, errors.shape[1])
    return errors if repeat == 1 else B.split(errors, repeat).sum(-1)


def _halved(values: Tensor) -> Tensor:
    """Sums over the last axis, in place: its upper half is added to the lower one until one is left; the compiled
    search keeps this order."""
    left = values.shape[-1]
    while left > 1:
        half = (left + 1) // 2
        values[..., : left - half] += values[..., half:left]
        left = half
    return values[..., 0]


def span_blocks(format: Format, blocks: int) -> int:
    """Blocks in a span, for rows of ``blocks`` blocks."""
    if format.fit_block == 0 or format.block == 0:
        return blocks
    return max(1, format.fit_block // format.block)
