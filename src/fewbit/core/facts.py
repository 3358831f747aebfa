# SPDX-License-Identifier: Apache-2.0
"""Facts: what calibration saw at the input of a layer. A monoid: collect anywhere, merge in a fixed order.

Sums, not means, so that merging is exact in the order it is done; every mean is derived.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Facts:
    """Statistics of the inputs ``x`` (tokens, columns) of one layer.

    ``total``, ``total_square``, ``largest``: (columns,) sums of x and x^2 and max|x|, float32.
    ``gram``: (columns, columns) float32 sum of x x^T, or None when no method asked for it.
    """

    columns: int
    tokens: int
    total: Tensor
    total_square: Tensor
    largest: Tensor
    gram: Tensor | None = None

    @staticmethod
    def none(columns: int, gram: bool = False) -> Facts:
        """No token seen: the identity of :meth:`merge`."""
        zero = torch.zeros(columns)
        return Facts(columns, 0, zero, zero, zero, torch.zeros(columns, columns) if gram else None)

    @staticmethod
    def of(x: Tensor, gram: bool = False) -> Facts:
        """From inputs of shape (..., columns)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if x.shape[0] == 0:
            return Facts.none(x.shape[1], gram)
        return Facts(
            x.shape[1], x.shape[0], x.sum(0), x.square().sum(0), x.abs().amax(0), x.T @ x if gram else None
        )

    def merge(self, other: Facts) -> Facts:
        """Facts of both streams together."""
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        return Facts(
            self.columns,
            self.tokens + other.tokens,
            self.total + other.total,
            self.total_square + other.total_square,
            torch.maximum(self.largest, other.largest),
            gram,
        )

    @property
    def mean_square(self) -> Tensor:
        """E[x^2], (columns,); all ones when no token was seen, which is what rounding assumes."""
        return self.total_square / self.tokens if self.tokens else torch.ones(self.columns)

    @property
    def second_moment(self) -> Tensor:
        """E[x x^T], (columns, columns); the identity when no token was seen."""
        if self.gram is None or not self.tokens:
            return torch.eye(self.columns)
        return self.gram / self.tokens
