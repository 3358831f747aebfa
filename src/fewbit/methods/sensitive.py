# SPDX-License-Identifier: Apache-2.0
"""Weights that count by what the loss minds: the Fisher diagonal as the importance of a format's own weighted fit.

The engine of :mod:`fewbit.methods.skm` and :mod:`fewbit.methods.squeezellm`. To second order, with the Hessian of the
loss taken to be its Fisher diagonal F, changing W by D costs ``1/2 sum_ij F_ij D_ij^2``.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core import format as F
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, UnsupportedError
from fewbit.methods import objective


def refuse(format: Format, vectors: bool = False) -> str | None:
    """None, or why no weighted fit of levels, or with ``vectors`` none of a codebook, serves ``format``."""
    if vectors and format.height > 1:
        return None
    reason = objective.refuse_vectors(format)
    if reason is None and not format.best_fit:
        reason = f"the values of {format.name} are not clustered from the weights"
    return reason


def importance(method: str, weight: Tensor, format: Format, facts: Facts, vectors: bool = False) -> Tensor | None:
    """The Fisher diagonal of ``weight`` (rows, columns); None when no token was seen, as all weights count alike then.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width), or there is no Fisher diagonal of that
            shape.
        UnsupportedError: :func:`refuse`.
    """
    objective.check(method, weight, format, facts)
    if (reason := refuse(format, vectors)) is not None:
        raise UnsupportedError(f"{method} to {format.name}", reason, "palettes work, such as palette3/row")
    if not facts.tokens:
        return None
    if facts.fisher is None or facts.fisher.shape != weight.shape:
        found = "the facts hold none" if facts.fisher is None else f"it is of shape {tuple(facts.fisher.shape)}"
        works = "collect it (fewbit.run.sensitivity does), or use method clip, which weighs by E[x^2]"
        raise InputError(f"{method} of a weight of shape {tuple(weight.shape)} by its Fisher diagonal", found, works)
    if not bool((facts.fisher >= 0).all()):
        raise InputError(f"{method} by a Fisher diagonal", "an entry is negative or NaN", "collect it again")
    return facts.fisher.float()


def fitted(weight: Tensor, format: Format, worth: Tensor | None) -> QTensor:
    """Nearest of the levels of least ``sum worth (w - w_hat)^2``; ``worth`` (rows, columns), or None for ones. No
    levels do better, but for the rounding of these to float16."""
    weight = weight.float()
    format = format.bind(weight)
    params = F.fit(format, weight, worth)
    return QTensor.nearest(format, weight, params)
