# SPDX-License-Identifier: Apache-2.0
"""The search under an importance matrix in float64, one block after the other: weighted least squares by a solver.

Blocks are rows of (blocks, block) arrays; ``v`` are the weights of errors. Parameters of a span are placed by
``store``, which gives what the format keeps of scales and offsets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Store = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def least_squares(codes: np.ndarray, w: np.ndarray, v: np.ndarray, levels: int, kind: str) -> tuple[float, float]:
    """Scale and offset of one block; ``kind``: "sym", "asym" (no offset above 0) or "min" (any)."""
    root = np.sqrt(v)
    if kind == "sym":
        scale = np.linalg.lstsq((root * (codes - levels / 2))[:, None], root * w, rcond=None)[0][0]
        return scale, -scale * levels / 2
    scale, offset = np.linalg.lstsq(np.stack([root * codes, root], 1), root * w, rcond=None)[0]
    if kind == "asym" and offset > 0:
        return np.linalg.lstsq((root * codes)[:, None], root * w, rcond=None)[0][0], 0.0
    return scale, offset


def grid(w: np.ndarray, v: np.ndarray, levels: int, kind: str, steps: int) -> tuple[float, float]:
    """The best of the grids tried for one block."""
    found = []
    for more in np.linspace(-0.9, 0.9, steps):
        if kind == "sym":
            step = -w[np.abs(w).argmax()] / (levels / 2 + more)
            codes = np.clip(np.round(w / step), -levels / 2, levels / 2 - 1) + levels / 2
        else:
            low = min(w.min(), 0.0) if kind == "asym" else w.min()
            codes = np.clip(np.round((w - low) / ((w.max() - low) / (levels - 1 + more))), 0, levels - 1)
        scale, offset = least_squares(codes, w, v, levels, kind)
        found.append(((v * (scale * codes + offset - w) ** 2).sum(), scale, offset))
    return min(found)[1:]


def error(w: np.ndarray, v: np.ndarray, levels: int, scale: np.ndarray, offset: np.ndarray) -> tuple[float, np.ndarray]:
    """Of a span (blocks, block) rounded to the nearest levels of stored grids, and the codes."""
    codes = np.clip(np.round((w - offset[:, None]) / scale[:, None]), 0, levels - 1)
    return float((v * (scale[:, None] * codes + offset[:, None] - w) ** 2).sum()), codes


def imatrix_oracle(
    w: np.ndarray, worth: np.ndarray, levels: int, kind: str, store: Store, steps: int, rounds: int
) -> float:
    """Least error of one span ``w`` (blocks, block); rounding to nearest is not among the candidates."""
    v = worth * np.sqrt(2 * (w**2).mean() + w**2)
    pairs = [grid(*pair, levels, kind, steps) for pair in zip(w, v, strict=True)]
    errors = []
    for _ in range(rounds + 1):
        scale, offset = store(*(np.array(values) for values in zip(*pairs, strict=True)))
        lost, codes = error(w, v, levels, scale, offset)
        errors.append(lost)
        pairs = [least_squares(*three, levels, kind) for three in zip(codes, w, v, strict=True)]
    return min(errors)
