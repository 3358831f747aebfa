# SPDX-License-Identifier: Apache-2.0
"""Clipping search: rounding to nearest with ranges chosen to lose least at the layer's output.

Every block's range is shrunk over a grid of ratios and the one of least ``sum_i E[x_i^2] (w_i - w_hat_i)^2`` is kept.
The inputs' correlations are ignored, so nothing but E[x^2] is needed. This is the search that GPTQ's code runs on
``|w - w_hat|^2.4`` (github.com/IST-DASLab/gptq); the weights are ours to state: E[x^2]. llama.cpp's search under its
importance matrix is another: :mod:`fewbit.methods.imatrix`.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.methods import objective, ranges


@exact()
def clip(weight: Tensor, format: Format, facts: Facts | None = None, *, steps: int = 24, floor: float = 0.4) -> QTensor:
    """Quantize ``weight`` (rows, columns) to the nearest values of searched ranges.

    Args:
        weight: float, (rows, columns).
        format: any format whose codes stand for one weight each.
        facts: of the inputs; E[x^2] is used. Without facts, or when no token was seen, all inputs count the same.
        steps: ratios tried, from 1 down to ``floor``; plain rounding's own fit is tried besides.
        floor: the smallest ratio.

    Returns:
        A QTensor whose weighted error is at most that of rounding to nearest, span by span.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width).
        SpecError: ``steps`` or ``floor`` out of range.
        UnsupportedError: a code of ``format`` stands for several weights.
    """
    ratios = ranges.grid(steps, floor)
    objective.check("clip", weight, format, facts)
    objective.check_scalar("clip", format)
    weight = weight.float()
    format = format.bind(weight)
    params = ranges.search(format, weight, None if facts is None else facts.mean_square, ratios)
    return QTensor.nearest(format, weight, params)
