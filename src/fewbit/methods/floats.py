# SPDX-License-Identifier: Apache-2.0
"""A vector of a model that stays in float, such as the weight of a norm, learned as it is stored.

As arrays of formats do in :mod:`fewbit.methods.scales`, it moves in its own unit::

    p = dtype(p0 + r u),   |r| <= 1/2
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.tuning import Values
from fewbit.methods.scales import FAR, unit

RATE = 1e-3
"""Of the unit."""


class FloatVector:
    """What of ``vector``, stored in ``dtype``, can be learned: ``shift`` is r. A Learnable but for codes."""

    def __init__(self, vector: Tensor, dtype: torch.dtype) -> None:
        self._from, self._dtype = vector.float(), dtype
        self._unit = unit(self._from)
        self.start: Values = {"shift": torch.zeros_like(self._from)}
        self.bounds = {"shift": (-FAR, FAR)}

    def weight(self, values: Values) -> Tensor:
        return (self._from + values["shift"] * self._unit).to(self._dtype).float()

    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        return {"shift": grad * self._unit}
