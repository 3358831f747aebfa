# SPDX-License-Identifier: Apache-2.0
"""What a layer's error costs the whole model, estimated from facts that were collected once: nats a token.

A change D of a weight changes the loss, at its minimum, by half of what the Fisher information makes of D. Two parts of
it are known, from S sequences of T tokens (:mod:`fewbit.run.sensitivity`)::

    F_oi = sum over sequences of (d L / d W_oi)^2            L: mean loss of the sequence
    G    = sum over tokens of x x^T

    fisher    T/2S sum_oi F_oi D_oi^2                        every weight on its own: errors that cancel count in full
    output    T/2S sum_o  r_o  d_o G d_o^T                   r_o = E[g_o^2], g = d L / d y of a token

``output`` is the layer's output error, GPTQ's objective, every output weighted by its mean squared gradient: F factored
into E[g_o^2] E[x_i^2], as where gradients and inputs of different tokens are independent (the diagonal, on the side of
the outputs, of Martens and Grosse 2015, arXiv:1503.05671). Of facts that are too old to have seen gradients at outputs,
r_o is what F says of it, sum_i F_oi / sum_i G_ii. Both are second-order, and add up over layers. Of errors so
large that the loss is no parabola any more, below 3 bits, they say which layer minds more, not how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.methods import objective

Estimate = Callable[[Tensor, Facts, float], float]
"""``estimate(error, facts, half)``: of one matrix; ``error`` (rows, columns), ``half`` is T/2S."""


def fisher(error: Tensor, facts: Facts, half: float) -> float:
    """T/2S sum_oi F_oi D_oi^2."""
    assert facts.fisher is not None
    return half * float((error.float().square() * facts.fisher).sum(dtype=torch.float64))


def output(error: Tensor, facts: Facts, half: float) -> float:
    """T/2S sum_o r_o d_o G d_o^T; with E[x^2] alone, G is its diagonal. No token, no harm."""
    if not facts.tokens:
        return 0.0
    assert facts.output_square is not None
    rows = facts.output_square.double() / facts.tokens
    return half * facts.tokens * float((rows * objective.row_errors(error, facts)).sum())


ESTIMATES: dict[str, Estimate] = {"output": output, "fisher": fisher}


def of_layer(by: str, weight: Tensor, values: Tensor, known: Sequence[Facts], half: float) -> float:
    """Of a layer whose ``weight`` (experts * rows, columns) becomes ``values``; ``known``: one entry an expert, the
    Fisher diagonal in it."""
    errors = (weight - values).chunk(len(known))
    return sum(ESTIMATES[by](error, facts, half) for error, facts in zip(errors, known, strict=True))
