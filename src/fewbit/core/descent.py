# SPDX-License-Identifier: Apache-2.0
"""Descent: how far values move along their gradients, step by step. Plain tensors, updated in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

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


class Descent:
    """Some arrays on their way: ``values`` begin as copies of ``start``, and move by ``rule`` within their ``bounds``.

    ``rate``: of the first step.
    """

    def __init__(
        self, start: Mapping[str, Tensor], bounds: Mapping[str, tuple[float, float]], rule: Rule, rate: float
    ) -> None:
        self.values = {name: array.clone() for name, array in start.items()}
        self._bounds, self._rule, self._rate = bounds, rule, rate

    def step(self, grads: Mapping[str, Tensor], share: float) -> None:
        """Move against ``grads``, at ``share`` of the first rate."""
        for name, grad in grads.items():
            self._rule.step(name, self.values[name], grad, self._rate * share)
            self.values[name].clamp_(*self._bounds[name])

    def copy(self) -> dict[str, Tensor]:
        """What ``values`` are now."""
        return {name: array.clone() for name, array in self.values.items()}


def schedule(iters: int, looks: int, warmup: float = 0) -> Iterator[tuple[float, bool]]:
    """Of each of ``iters`` steps the share of the first rate, which rises through ``warmup`` steps and falls linearly
    to zero; and whether it is one of the ``looks`` after which one looks at what was learned, the last step the last.
    """
    looked = {iters * look // looks for look in range(1, looks + 1)}
    for step in range(1, iters + 1):
        yield min(step / (warmup + 1), 1 - (step - 1) / iters), step in looked
