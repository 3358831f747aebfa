# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: outliers of the inputs are moved into the weight, which has room for them.

Xiao, Lin, Seznec, Wu, Demouth, Han 2022, arXiv:2211.10438: channel j of the inputs is divided by

    s_j = max_t |x_tj|^alpha / max_o |w_oj|^(1 - alpha)

and column j of the weight multiplied by it. Where we depart from it:

* they fold 1 / s into the norm before the layer, so all layers behind one norm share s, and layers behind no norm
  (o_proj, down_proj) get none; here every layer divides its own input when it runs, one multiplication a channel;
* channels that were always zero keep s = 1 instead of the smallest s there is;
* what is stored is 1 / s in float16, s within 2^-14 and 2^14 (theirs: at least 1e-5); the weight is multiplied by the
  inverse of what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.core.rewrite import Scale
from fewbit.core.sums import all_finite, column_sums
from fewbit.errors import InputError

LEAST_WEIGHT = 1e-5
"""max|w| of a column counts as at least this, as in the authors' code: a zero column must not divide by zero."""
WIDEST = 2.0**14
"""s lies within 1 / WIDEST and WIDEST, so that 1 / s is a normal float16."""


def smooth(weight: Tensor, facts: Facts, seed: int = 0, *, alpha: float = 0.5) -> Scale:
    """Scales for the inputs of ``weight`` (rows, columns).

    Args:
        weight: float, (rows, columns).
        facts: of the inputs; max|x| is used. When no token was seen nothing is scaled.
        seed: ignored; nothing here is drawn.
        alpha: share of the difficulty that goes to the weight: 0 evens out the weight alone, 1 the inputs alone.

    Raises:
        InputError: the weight or the facts hold NaN or infinity, or the facts do not say max|x|.
    """
    asked = f"smooth of a weight of shape {tuple(weight.shape)}"
    if facts.largest is None or facts.columns != weight.shape[1]:
        raise InputError(asked, "the facts do not hold max|x| of its inputs", "smooth before inputs are rotated")
    heaviest = column_sums(weight.float())[3]
    if not all_finite(heaviest) or not all_finite(facts.largest):
        raise InputError(asked, "the weight or its inputs hold NaN or infinity", "leave this layer in float")
    divisor = facts.largest.pow(alpha) / heaviest.clamp_min(LEAST_WEIGHT).pow(1 - alpha)
    divisor = torch.where(facts.largest > 0, divisor.clamp(1 / WIDEST, WIDEST), 1.0)
    return Scale((1 / divisor).half())
