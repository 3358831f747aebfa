# SPDX-License-Identifier: Apache-2.0
"""Learned rounding and ranges (SignRound, Cheng et al. 2023, arXiv:2309.05516; github.com/intel/auto-round).

Each weight has an offset V in [-1/2, 1/2], in steps of its grid, and the ends of each block's grid have factors beta
and gamma in [0, 1]. With s and o the scale and offset that the format stores for the grid from beta lo to gamma hi::

    w = s clip(round((W - o) / s + V), 0, levels - 1) + o

V starts at 0, beta and gamma at 1, where w is what is already stored. All follow the sign of their gradient, taken
straight through the rounding. Where t = (W - o) / s + V is within half a step of a level::

    dw/dV = s      dw/ds = (w - W) / s      dw/do = 0

and beyond the ends ``dw/dV = 0, dw/ds = code, dw/do = 1``. Where we depart from the authors' code:

* scales are what the format stores, rounded to float16, before the loss sees them;
* symmetric grids begin as plain rounding has them where that loses less than the full range that theirs begin with, on
  whose last level the largest weight lies (:mod:`fewbit.methods.ranges`; the sign of a scale stays what it was);
* it starts from any method, not from rounding alone. Where that method did not take the nearest level, W is replaced by
  the point next to the level taken from which it is the nearest.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format, Params
from fewbit.core.qtensor import QTensor
from fewbit.core.tuning import Learnable, Values
from fewbit.errors import UnsupportedError
from fewbit.methods import objective, ranges

NEAR = 0.49
"""Steps from its level at which a weight is put that was not at the nearest one."""
FAR, WIDE, CLOSE = 256.0, 2.0, 0.25
"""Where weights are learned: steps of the grid that one may travel, times its range that a block may grow, and what
:data:`NEAR` is, as it would go back at once from the brink."""
MANY, FEW_BITS = 1000, 3
"""From so many steps on, and up to so many bits, the rate is twice as high."""


@exact()
def autoround(weight: Tensor, format: Format, facts: Facts, **options: float) -> QTensor:
    """Rounding to nearest, from which rounding and ranges are learned on the output of the whole block.

    Raises:
        InputError: the weight cannot be used. UnsupportedError: nothing of ``format`` can be learned.
    """
    objective.check("autoround", weight, format)
    if (reason := refuse(format)) is not None:
        raise UnsupportedError(f"autoround to {format.name}", reason, "int3/g64/asym and the like have even grids")
    weight = weight.float()
    bound = format.bind(weight)
    params = ranges.search(bound, weight, None, (1.0,)) if bound.grid == "magnitude" else F.fit(bound, weight)
    return QTensor.nearest(bound, weight, params)


def refuse(format: Format) -> str | None:
    """None, or why rounding and ranges of ``format`` cannot be learned."""
    vectors = objective.refuse_vectors(format)
    if vectors is None and not format.grid:
        return "its levels are not evenly spaced between the ends of a block"
    return vectors


def rate(iters: int, format: Format) -> float:
    """Lets an offset travel half a step in ``iters`` steps of a rate that falls to zero."""
    return (2.0 if iters >= MANY and format.bits <= FEW_BITS else 1.0) / max(1, iters)


class Rounding(Learnable):
    """``offset`` is V, as (rows, blocks, block), of magnitude ``reach`` at most; ``low`` and ``high`` are beta and
    gamma, (rows, blocks, 1), ``wide`` at most."""

    def __init__(
        self, weight: Tensor, qtensor: QTensor, reach: float = 0.5, wide: float = 1.0, near: float = NEAR
    ) -> None:
        self._format = format = qtensor.format
        codes, params = qtensor.logical()
        self._columns = qtensor.shape[1]
        blocks, codes = B.split(weight.float(), format.block), B.split(codes, format.block)
        scale, values = _scale(format, params), format.decode(codes, params)
        put = values + (blocks - values).clamp(-near * scale.abs(), near * scale.abs())
        self._weight = torch.where(format.encode(blocks, params) == codes, blocks, put)
        self._ends = _ends(format, params)
        self._sign = scale.sign() if bool((scale < 0).any()) else None
        ones = torch.ones_like(scale)
        self.start = {"offset": torch.zeros_like(blocks), "low": ones, "high": ones.clone()}
        self.bounds = {"offset": (-reach, reach), "low": (0.0, wide), "high": (0.0, wide)}

    def _params(self, values: Values) -> Params:
        low, high = self._ends
        ends = torch.cat([low * values["low"], high * values["high"]], -1)
        fitted = self._format.fit(ends, torch.ones(1, 1, 1, device=ends.device))
        if self._sign is None:
            return fitted
        scale = _scale(self._format, fitted) * self._sign
        return self._format.placed(scale, torch.zeros_like(scale))

    def _strips(self) -> list[slice]:
        return ranges.strips(len(self._weight), self._columns, self._weight.device.type)

    def weight(self, values: Values) -> Tensor:
        params, chosen = self._params(values), torch.empty_like(self._weight)
        scale = _scale(self._format, params)
        for rows in self._strips():
            moved = values["offset"][rows] * scale[rows] + self._weight[rows]
            chosen[rows] = self._format.nearest(moved, _of(params, rows))[1]
        return B.join(chosen, self._columns)

    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        params, grad = self._params(values), B.split(grad, self._format.block)
        parts = [self._straight(rows, values["offset"][rows], _of(params, rows), grad[rows]) for rows in self._strips()]
        by_value, by_scale, by_offset = (torch.cat(each) for each in zip(*parts, strict=True))
        free = self._format.grid == "ends"
        return {"offset": by_value, **self._ends_gradient(values, by_scale, by_offset if free else None)}

    def _straight(self, rows: slice, by: Tensor, params: Params, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of V, here ``by``, and of scale and offset, (rows, blocks, 1), straight through the rounding."""
        format, weight, last = self._format, self._weight[rows], self._format.levels - 1
        scale, offset = _scale(format, params), _offset(format, params)
        moved = by * scale + weight
        codes, chosen = format.nearest(moved, params)
        step = (moved - offset) / scale
        inside = (step >= -0.5) & (step <= last + 0.5)
        beyond = codes.float() if format.grid == "ends" else chosen / scale
        by_scale = (grad * torch.where(inside, (chosen - weight) / scale, beyond)).sum(-1, keepdim=True)
        by_offset = torch.where(inside, 0.0, grad).sum(-1, keepdim=True)
        return torch.where(inside, grad * scale, 0.0), by_scale, by_offset

    def _ends_gradient(self, values: Values, scale: Tensor, offset: Tensor | None) -> dict[str, Tensor]:
        """From the gradients of scale and, where it is free, offset (rows, blocks, 1): s = (hi - lo) / (levels - 1) and
        o = lo; without a free offset s = +-2 max(-lo, hi) / (levels - 1)."""
        (low, high), last = self._ends, self._format.levels - 1
        if offset is not None:
            return {"low": (offset - scale / last) * low, "high": scale * high / last}
        deeper = -low * values["low"] > high * values["high"]
        both = 2 * scale * high / last * (1.0 if self._sign is None else self._sign)
        return {"low": torch.where(deeper, both, 0.0), "high": torch.where(deeper, 0.0, both)}

    def freeze(self, values: Values) -> QTensor:
        params = self._params(values)
        moved = values["offset"] * _scale(self._format, params) + self._weight
        codes = B.join(self._format.encode(moved, params), self._columns).contiguous()
        return QTensor.of(self._format, codes, params)


Weights = partial(Rounding, reach=FAR, wide=WIDE, near=CLOSE)
"""Weights that go wherever their gradient leads, straight through the rounding, and ranges (EfficientQAT's first phase,
Chen et al. 2024, arXiv:2407.11062)."""


def weights_rate(iters: int, format: Format) -> float:
    """Steps of the grid."""
    return 3e-3


def _of(params: Params, rows: slice) -> Params:
    """Those of some ``rows``."""
    return {name: values[rows] for name, values in params.items()}


def _scale(format: Format, params: Params) -> Tensor:
    """(rows, blocks, 1) float32."""
    return format.physical(params).scale.unsqueeze(-1)  # type: ignore[union-attr]


def _offset(format: Format, params: Params) -> Tensor:
    """(rows, blocks, 1) float32: the value of code 0."""
    return format.physical(params).offset.unsqueeze(-1)  # type: ignore[union-attr]


def _ends(format: Format, params: Params) -> tuple[Tensor, Tensor]:
    """Least and greatest weight of a block whose fit would be ``params``, (rows, blocks, 1) each."""
    reach = _scale(format, params).abs() * (format.levels - 1)
    if format.grid == "ends":
        low = _offset(format, params)
        return low, low + reach
    return -reach / 2, reach / 2
