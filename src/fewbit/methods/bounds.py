# SPDX-License-Identifier: Apache-2.0
"""Learned ranges: where the grid of each block of weights begins and ends, and of what goes into each layer.

The second stage of 2DQuant (Liu et al. 2024, arXiv:2406.06649; "Distillation Quantization Calibration"): the two bounds
of every quantizer are learned, and nothing else. A block whose grid ran from lo to hi runs from ``low lo`` to ``high
hi``, and its weights go to the nearest value of that; both factors start at 1, where it is what is stored already, and
follow their gradients, straight through the rounding, as :mod:`fewbit.methods.autoround` has them.

Where we depart from the authors' code: ranges are the format's own, one a row or less, rounded to float16, where theirs
are one a matrix in float32; steps are in units of the range, where theirs are absolute.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.tuning import Learnable, Values
from fewbit.methods.autoround import Rounding

MOST = 2.0
"""Times as far from 0 as it was, at most, an end may lie."""


def rate(iters: int, format: Format) -> float:
    """Of what the range was: that of the paper, whose bounds are near 1."""
    return 1e-2


class Bounds(Learnable):
    """``low`` and ``high``, (rows, blocks, 1): what the ends of each block are multiplied by."""

    def __init__(self, weight: Tensor, qtensor: QTensor) -> None:
        self._rounding = Rounding(weight, qtensor)
        self._still = {"offset": self._rounding.start["offset"]}
        self.start = {name: self._rounding.start[name] for name in ("low", "high")}
        self.bounds = dict.fromkeys(self.start, (0.0, MOST))

    def weight(self, values: Values) -> Tensor:
        return self._rounding.weight({**values, **self._still})

    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        found = self._rounding.gradient({**values, **self._still}, grad)
        return {name: found[name] for name in self.start}

    def freeze(self, values: Values) -> QTensor:
        return self._rounding.freeze({**values, **self._still})
