# SPDX-License-Identifier: Apache-2.0
"""HQQ as its authors write it, in float64, one block at a time: inverse scale s and zero z, codes W s + z.

Only that the minimum ``-z / s`` is stored in float16 after each round and that a block stops for itself is ours. The
authors stop the whole tensor; a tensor of one block is where both agree.
"""

from __future__ import annotations

import numpy as np


def hqq_oracle(
    block: np.ndarray, scale: float, minimum: float, levels: int, p: float, beta: float, kappa: float, iterations: int
) -> tuple[float, float, int, float]:
    """For one ``block`` (columns,): minimum, mean of ``|W - W_r|``, number of rounds that lowered it, and the least
    part of it by which a round did or did not."""
    w, s = block.astype(np.float64), 1 / scale
    z = -minimum * s

    def rounded(zero: float) -> tuple[np.ndarray, np.ndarray]:
        codes = np.clip(np.round(w * s + zero), 0, levels - 1)
        return codes, (codes - zero) / s

    codes, values = rounded(z)
    least, rounds, margin = np.abs(w - values).mean(), 0, np.inf
    for _ in range(iterations):
        x = w - values
        with np.errstate(divide="ignore"):
            auxiliary = np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (p - 1) / beta, 0)
        trial = float(np.float16(-(codes - (w - auxiliary) * s).mean() / s))
        codes, values = rounded(-trial * s)
        error = np.abs(w - values).mean()
        margin = min(margin, abs(error - least) / least)
        if error >= least:
            break
        minimum, least, rounds = trial, error, rounds + 1
        beta *= kappa
    return minimum, least, rounds, margin
