# SPDX-License-Identifier: Apache-2.0
"""Rules of descent: how far a value moves along its gradient. Plain tensors, updated in place."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Rule(ABC):
    """For the arrays of one layer, called once a step and array with the same ``name``."""

    @abstractmethod
    def step(self, name: str, value: Tensor, grad: Tensor, rate: float) -> None:
        """Move ``value`` against ``grad``, both float32 of one shape."""


class SignSGD(Rule):
    """``value -= rate sign(grad)`` (Bernstein et al. 2018, arXiv:1802.04434, without momentum)."""

    def step(self, name: str, value: Tensor, grad: Tensor, rate: float) -> None:
        value.sub_(grad.sign(), alpha=rate)


class Adam(Rule):
    """Kingma, Ba 2014, arXiv:1412.6980::

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        value -= rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    ``eps`` is relative to the largest ``|g|`` of the first step: losses here have no common unit.
    """

    B1, B2, EPS = 0.9, 0.95, 1e-6

    def __init__(self) -> None:
        self._moments: dict[str, tuple[Tensor, Tensor, int, float]] = {}

    def step(self, name: str, value: Tensor, grad: Tensor, rate: float) -> None:
        if name not in self._moments:
            floor = self.EPS * float(grad.abs().amax())
            self._moments[name] = (torch.zeros_like(value), torch.zeros_like(value), 0, max(floor, 1e-30))
        first, second, steps, floor = self._moments[name]
        steps += 1
        first.mul_(self.B1).add_(grad, alpha=1 - self.B1)
        second.mul_(self.B2).addcmul_(grad, grad, value=1 - self.B2)
        spread = second.div(1 - self.B2**steps).sqrt_().add_(floor)
        value.sub_(first / spread, alpha=rate / (1 - self.B1**steps))
        self._moments[name] = (first, second, steps, floor)
