# SPDX-License-Identifier: Apache-2.0
"""AWQ: inputs that are large get finer weights, by as much as loses least at the output of the attention or MLP.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023, arXiv:2306.00978 (github.com/mit-han-lab/llm-awq).
Channel j of the inputs is divided by s_j and column j of the weight multiplied by it, where ::

    s = a^r, a_j = mean_t |x_tj|, s at least 1e-4;   s = s / sqrt(max s  min s)

with the r of 0, 1/20 .. 19/20 whose weights, rounded to nearest in each layer's own format, lose least: layers that
share an input share r, and what they lose is the mean squared error of the output of the module around them
(:mod:`fewbit.run.around`, which hands the ``power`` to this transform). As in the authors' code, the size of the
weights plays no part. Where the output of that module is the layer's own, as behind an output projection, and where no
such module is at hand (experts, networks that are no language models, facts collected beforehand), a layer looks for r
by itself, by ``tr(D G D^T)``, D what rounding changes in the weight and G = E[x x^T]: exactly the mean squared error
of its own output over the whole calibration.

Where we depart from the authors' code:

* they fold 1 / s into the norm or layer before, so an output projection behind grouped heads gets none; here every
  layer divides its own input when it runs, one multiplication a channel;
* the module sees what the quantized layers before it make of the calibration, where theirs are in float;
* what is stored is 1 / s in float16, s within 2^-14 and 2^14; the weight is multiplied by the inverse of what is
  stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbit.core import format as F
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.rewrite import Scale
from fewbit.core.sums import all_finite
from fewbit.errors import InputError

LEAST = 1e-4
"""s before it is normalised is at least this, as in the authors' code: channels that were always zero."""
WIDEST = 2.0**14
"""s lies within 1 / WIDEST and WIDEST, so that 1 / s is a normal float16."""


def powers(*, steps: int = 20, samples: int = 16) -> tuple[float, ...]:
    """The powers r that are tried at the output of the module around layers; none where ``samples`` is 0."""
    return tuple(step / int(steps) for step in range(int(steps))) if samples else ()


def awq(
    weight: Tensor,
    facts: Facts,
    seed: int,
    format: Format,
    *,
    steps: int = 20,
    samples: int = 16,
    power: float | None = None,
) -> Scale:
    """Scales for the inputs of ``weight`` (rows, columns), searched for what loses least in ``format``.

    Args:
        weight: float, (rows, columns).
        facts: of the inputs; mean|x| and the second moment are used. When no token was seen nothing is scaled.
        seed: ignored; nothing here is drawn.
        format: what the weight will be rounded to.
        steps: powers r tried: 0, 1 / steps, .. (steps - 1) / steps. The first is no scaling, and wins ties.
        samples: windows of the calibration on which the module around the layer is looked at, in whole batches; with 0
            every layer looks for itself. Nothing here looks at it.
        power: r, where it is known already.

    Raises:
        InputError: the weight or the facts hold NaN or infinity, or the facts lack mean|x| or the second moment.
    """
    asked = f"awq of a weight of shape {tuple(weight.shape)} to {format.name}"
    magnitude = facts.total_magnitude
    if magnitude is None or facts.columns != weight.shape[1] or (facts.tokens and facts.gram is None):
        found = "the facts do not hold mean|x| and the second moment of its inputs"
        raise InputError(asked, found, "collect them with gram=True, before inputs are rotated")
    moment = facts.second_moment
    if not all_finite(weight) or not all_finite(moment):
        raise InputError(asked, "the weight or its inputs hold NaN or infinity", "leave this layer in float")
    weight, best, least = weight.float(), Scale(torch.ones(weight.shape[1], dtype=torch.float16)), math.inf
    if power is not None and facts.tokens:
        return candidate(magnitude / facts.tokens, power)
    for tried in powers(steps=steps) if facts.tokens else ():
        scale = candidate(magnitude / facts.tokens, tried)
        lost = output_error(weight, scale.unweight(F.rounded(format, scale.weight(weight))), moment)
        if lost < least:
            best, least = scale, lost
    return best


def candidate(magnitude: Tensor, power: float) -> Scale:
    """The scale for mean|x| = ``magnitude`` (columns,) and the exponent ``power``."""
    divisor = magnitude.pow(power).clamp_min(LEAST)
    divisor = divisor / (divisor.amax().sqrt() * divisor.amin().sqrt())
    return Scale((1 / divisor.clamp(1 / WIDEST, WIDEST)).half())


def output_error(weight: Tensor, values: Tensor, moment: Tensor) -> float:
    """``E |(W - V) x|^2`` of a layer with inputs of ``moment`` = E[x x^T] (columns, columns)."""
    error = weight - values
    return float(((error @ moment) * error).sum(dtype=torch.float64))
