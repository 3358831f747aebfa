# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: every weight takes the closest value of its block's grid. The baseline of everything."""

from __future__ import annotations

import math

from torch import Tensor

from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.methods import objective


@exact()
def rtn(weight: Tensor, format: Format, facts: Facts | None = None) -> QTensor:
    """Quantize ``weight`` (rows, columns) without looking at data; ``facts`` are ignored.

    Raises:
        InputError: the weight is no matrix or holds NaN or infinity.
    """
    objective.check_matrix("rtn", weight, format)
    if not format.even:
        objective.check_finite("rtn", weight, format)
    weight = weight.float()
    made = QTensor.rounded(format.bind(weight), weight)
    if format.even and (made.lost is None or not math.isfinite(made.lost[1])):  # one pass finds that as well
        objective.check_finite("rtn", weight, format)
    return made
