# SPDX-License-Identifier: Apache-2.0
"""Learned rounding and ranges by the definition, in float64, one number at a time; and its straight-through gradient.

Straight through means: whatever rounding added (to a code, to a stored scale, to a stored offset) is held constant
while the rest is differentiated. So the gradient is a difference quotient of the function in which those are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

H = 1e-6


@dataclass(frozen=True)
class Block:
    """One block: weights ``w`` (n,), ends ``low`` and ``high`` of its first grid, the grid stored now, its kind, and
    the sign of its scale."""

    w: np.ndarray
    low: float
    high: float
    scale: float
    offset: float
    levels: int
    symmetric: bool
    sign: float = 1.0

    def grid(self, beta: float, gamma: float) -> tuple[float, float]:
        """Scale and offset before they are rounded to what can be stored."""
        last = self.levels - 1
        if self.symmetric:
            scale = self.sign * 2 * max(-self.low * beta, self.high * gamma) / last
            return scale, -scale * self.levels / 2
        return (self.high * gamma - self.low * beta) / last, self.low * beta

    def codes(self, v: np.ndarray) -> np.ndarray:
        return np.round((self.w - self.offset) / self.scale + v)

    def values(self, v: np.ndarray) -> np.ndarray:
        return self.scale * np.clip(self.codes(v), 0, self.levels - 1) + self.offset

    def gradient(self, v: np.ndarray, beta: float, gamma: float, outer: np.ndarray) -> tuple[np.ndarray, float, float]:
        """From the gradient ``outer`` (n,) of the values, those of V, beta and gamma."""
        scale, offset = self.grid(beta, gamma)
        scale_error, offset_error = self.scale - scale, self.offset - offset
        codes = self.codes(v)
        added = codes - ((self.w - self.offset) / self.scale + v)
        inside = (codes >= 0) & (codes < self.levels)  # the ends count as inside

        def smooth(v: np.ndarray, beta: float, gamma: float) -> float:
            s, o = self.grid(beta, gamma)
            s += scale_error
            o = -s * self.levels / 2 if self.symmetric else o + offset_error
            t = (self.w - o) / s + v + added
            return float(outer @ (s * np.where(inside, t, np.clip(codes, 0, self.levels - 1)) + o))

        by_v = np.array([
            (smooth(v + H * e, beta, gamma) - smooth(v - H * e, beta, gamma)) / (2 * H) for e in np.eye(len(v))
        ])  # fmt: skip
        # one-sided at 1, where the larger of both ends may change
        by_beta = (smooth(v, beta, gamma) - smooth(v, beta - H, gamma)) / H
        by_gamma = (smooth(v, beta, gamma) - smooth(v, beta, gamma - H)) / H
        return by_v, by_beta, by_gamma
