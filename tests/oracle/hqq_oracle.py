# SPDX-License-Identifier: Apache-2.0
"""HQQ as its authors write it, in float64, block after block: inverse scale s and zero z, codes W s + z.

Only that the minimum ``-z / s`` is stored in float16 after each round, and that the grids of least mean are returned,
is ours.
"""

from __future__ import annotations

import numpy as np

Block = tuple[np.ndarray, float, float]
"""Weights (columns,), their scale and their minimum."""


def hqq_oracle(
    blocks: list[Block], levels: int, p: float, beta: float, kappa: float, iterations: int
) -> tuple[list[float], float, int, float]:
    """Minima, the sum of all ``|W - W_r|``, the number of rounds that lowered it, and the least part of it by which a
    round did or did not."""

    def rounded(weights: np.ndarray, s: float, zero: float) -> tuple[np.ndarray, np.ndarray]:
        codes = np.clip(np.round(weights * s + zero), 0, levels - 1)
        return codes, (codes - zero) / s

    def lost(minima: list[float]) -> float:
        pairs = zip(blocks, minima, strict=True)
        return float(sum(np.abs(w - rounded(w, 1 / scale, -low / scale)[1]).sum() for (w, scale, _), low in pairs))

    blocks = [(weights.astype(np.float64), scale, low) for weights, scale, low in blocks]
    minima = [low for _, _, low in blocks]
    least, rounds, margin = lost(minima), 0, np.inf
    for _ in range(iterations):
        trial = []
        for (w, scale, _), low in zip(blocks, minima, strict=True):
            s = 1 / scale
            codes, values = rounded(w, s, -low * s)
            x = w - values
            with np.errstate(divide="ignore"):
                auxiliary = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (p - 1) / beta, 0)
            trial.append(float(np.float16(-(codes - (w - auxiliary) * s).mean() / s)))
        error = lost(trial)
        margin = min(margin, abs(error - least) / least)
        if error >= least:
            break
        minima, least, rounds = trial, error, rounds + 1
        beta *= kappa
    return minima, least, rounds, margin
