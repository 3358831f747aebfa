# SPDX-License-Identifier: Apache-2.0
"""ARB-RC: signs under row and column scales that are fitted in turn.

``W_hat = diag(a) sign(W) diag(c)`` (Li et al. 2024, arXiv:2410.03129, the RC variant), each scale the least squares one
of the other, weighted by ``h = E[x^2]``::

    a_o = sum_i h_i |W_oi| c_i / sum_i h_i c_i^2          c_i = sum_o |W_oi| a_o / sum_o a_o^2

Both stay positive, so the signs never change, and the alternation is the power iteration for the leading singular pair
of ``|W| diag(h^1/2)``: with h = 1 the scales of OneBit (arXiv:2402.11295). Where the format has groups, each has an a.
Where we depart from the paper: errors are weighted by h; no groups of columns by a bitmap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import float16
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.terms import Dense, Terms
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import objective, signs


@exact()
def arb(weight: Tensor, format: Format, facts: Facts, *, iterations: int = 15) -> Terms:
    """Signs of ``weight`` (rows, columns) under both scales.

    Args:
        weight: float, (rows, columns).
        format: signs; the paper's has one scale a row (``sign/channel``).
        facts: with E[x^2]; without any token all inputs count alike, as in the paper.
        iterations: how often both scales are fitted.

    Raises:
        InputError: the weight or the facts cannot be used. SpecError: no iteration.
        UnsupportedError: a block of ``format`` is not signs under one scale.
    """
    objective.check("arb", weight, format, facts)
    if (reason := signs.refuse(format)) is not None:
        raise UnsupportedError(f"arb to {format.name}", reason, "sign/channel would work")
    if iterations < 1:
        raise SpecError(f"arb with iterations={iterations}", "it must be positive", "15 is the paper's")
    row, column = scales(weight.double().abs(), facts.mean_square.double(), format.block, iterations)
    dense = signs.matrix(format, weight > 0, row)
    return Terms((weight.shape[0], weight.shape[1]), (Dense(dense),), None, float16.of(column))


def scales(magnitude: Tensor, worth: Tensor, block: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Row scales (rows, blocks) and column scales (columns,), of mean 1, for ``magnitude`` (rows, columns), >= 0."""
    columns = magnitude.shape[1]
    worth = worth if bool((worth > 0).any()) else torch.ones_like(worth)
    column = torch.ones(columns, dtype=magnitude.dtype)
    for _ in range(iterations):
        share = B.split((worth * column.square())[None], block).sum(-1)
        row = B.split(magnitude * (worth * column), block).sum(-1) / share.clamp_min(1e-300)
        wide = row.repeat_interleave(B.width(columns, block), 1)[:, :columns]
        column = (magnitude * wide).sum(0) / wide.square().sum(0).clamp_min(1e-300)
        middle = column.mean() or 1.0  # of a matrix of zeros
        row, column = row * middle, column / middle
    return row, column


def parts(format: Format, shape: tuple[int, int], *, iterations: int) -> Parts:
    """The signs, and 16 bits a column."""
    return Parts(((format, shape),), 2 * shape[1])
