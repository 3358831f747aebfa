# SPDX-License-Identifier: Apache-2.0
"""AWQ's two searches on the tokens themselves, in float64 loops, for asymmetric integers with float16 scales."""

from __future__ import annotations

import numpy as np


def nearest(part: np.ndarray, fitted: np.ndarray, levels: int) -> np.ndarray:
    """``part`` (columns,) rounded on the asymmetric grid that ``fitted`` (columns,) spans."""
    low, high = min(fitted.min(), 0.0), max(fitted.max(), 0.0)
    scale = np.float64(np.float16((high - low) / (levels - 1)))
    zero = np.clip(np.round(-low / scale), 0, levels - 1)
    return scale * (np.clip(np.round(part / scale + zero), 0, levels - 1) - zero)  # type: ignore[no-any-return]


def rounded(weight: np.ndarray, group: int, levels: int) -> np.ndarray:
    """``weight`` (rows, columns) rounded to nearest, group by group."""
    values = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            part = weight[row, first : first + group]
            values[row, first : first + group] = nearest(part, part, levels)
    return values


def scales(x: np.ndarray, power: float) -> np.ndarray:
    """s of every channel of the inputs ``x`` (tokens, columns)."""
    s = np.maximum(np.abs(x).mean(0) ** power, 1e-4)
    return s / np.sqrt(s.max() * s.min())  # type: ignore[no-any-return]


def scale_search(weight: np.ndarray, x: np.ndarray, group: int, levels: int, steps: int) -> list[float]:
    """Mean over the tokens of the squared error of the layer's output, for every power tried."""
    losses = []
    for step in range(steps):
        s = scales(x, step / steps)
        output = (x / s) @ rounded(weight * s, group, levels).T
        losses.append(float(((x @ weight.T - output) ** 2).sum(1).mean()))
    return losses


def clip_search(weight: np.ndarray, x: np.ndarray, group: int, levels: int, ratios: list[float]) -> np.ndarray:
    """(rows, groups, ratios): mean squared error of every group's part of the output."""
    rows, columns = weight.shape
    losses = np.empty((rows, -(-columns // group), len(ratios)))
    for row in range(rows):
        for number, first in enumerate(range(0, columns, group)):
            part, inputs = weight[row, first : first + group], x[:, first : first + group]
            for i, ratio in enumerate(ratios):
                most = ratio * np.abs(part).max()
                error = nearest(part, np.clip(part, -most, most), levels) - part
                losses[row, number, i] = ((inputs @ error) ** 2).mean()
    return losses
