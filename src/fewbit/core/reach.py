# SPDX-License-Identifier: Apache-2.0
"""What float16 scales could not reach of a weight: told, as the grid that is stored is not the one that was wanted.

Scales, minima and levels in float16 are at most 65504, and a scale that would be below 2^-24, the least float16 above
zero, is that. Groups beyond the first are cut off. Those below the second have a grid too coarse for them: one that
fits would leave no weight further away than half a step, which is at most ``max|w| / (levels - 1)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import float16
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor

CODED = 1 + 2.0**-7
"""How much larger a level of 8 bits may come out that was cut off before it was coded, next to the
largest float16."""


def told_of(made: QTensor, weight: Tensor | None) -> str:
    """What a report should say of ``made``, which stands for ``weight`` (rows, columns), or for part of a sum of terms
    (None, of which only what is cut off is known); empty where float16 holds it all."""
    format, params = made.format, made.logical()[1]
    if format.plain is not None and weight is not None:  # whose scales are those before they were coded
        format = format.plain
        params = F.fit(format, weight)
    beyond = _groups([params[p.name].abs() >= float16.LARGEST for p in format.params if p.dtype == torch.float16])
    least = _groups([params[p.name].abs() <= p.least for p in format.params if p.least])
    if weight is None:
        least = torch.zeros_like(least)
    elif bool(least.any()) or _beyond(weight):
        lost, whole = (_largest(each, format) for each in (made.dequantize() - weight, weight))
        least = least & (whole > 0) & (lost * (format.levels - 1) > whole)
        beyond = beyond | ((whole > 2 * float16.LARGEST) & (lost > whole - CODED * float16.LARGEST))
    told = [_told(beyond, f"reach beyond float16's {float16.LARGEST:.0f}: they are cut off")]
    told.append(_told(least, "need scales below float16's least, 2^-24: their grid is too coarse"))
    return "; ".join(filter(None, told))


def _beyond(weight: Tensor) -> bool:
    """Whether an entry lies beyond what any scale reaches."""
    ends = weight.aminmax()
    return max(float(ends.max), -float(ends.min)) > 2 * float16.LARGEST


def _groups(at: list[Tensor]) -> Tensor:
    """Whether any of the parameters ``at``, each (rows, blocks, ...), is so: (rows, blocks)."""
    found = torch.zeros(1, 1, dtype=torch.bool)
    for each in at:
        found = found | each.flatten(2).any(-1)
    return found


def _largest(values: Tensor, format: Format) -> Tensor:
    """The largest magnitude in every group of ``values`` (rows, columns): (rows, blocks)."""
    return B.fold(B.split(values.float(), format.block), format.height).abs().amax(-1)


def _told(groups: Tensor, what: str) -> str:
    number = int(groups.sum())
    return f"{number} of {groups.numel()} groups {what}" if number else ""
