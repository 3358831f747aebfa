# SPDX-License-Identifier: Apache-2.0
"""GPTQ as its paper defines it, in float64 and with no trick: the optimal update of optimal brain surgeon.

Frantar et al. 2022 (arXiv:2210.17323), equations 2 and 3 of optimal brain quantization in a fixed order: with F the
columns not yet rounded and H_F their second moment, rounding column q (the first of F) to ``quant(w_q)`` and moving
the others by

    delta_F = - (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_{:, q}

loses least. Here H_F^-1 is the explicit inverse of the remaining submatrix, computed again at every step, and the sum
of the paper's losses ``(w_q - quant(w_q))^2 / [H_F^-1]_qq`` is returned too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core import format as F
from fewbit.core.format import Format

Fit = Callable[[Format, Tensor, slice], dict[str, Tensor]]
"""``(format, float32 weight of some columns, which columns) -> params (rows, blocks, 1)``."""


def plain_fit(format: Format, weight: Tensor, columns: slice) -> dict[str, Tensor]:
    """The fit of rounding to nearest."""
    return F.fit(format, weight)


def damped(moment: Tensor, fraction: float) -> Tensor:
    """The second moment that the paper solves with: float64, its mean diagonal times ``fraction`` added.

    Inputs that are always zero stand apart: a one on the diagonal and nothing beside it, and they do not count in the
    mean.
    """
    matrix = moment.double().clone()
    dead = matrix.diagonal() == 0
    mean = matrix.diagonal()[~dead].mean() if (~dead).any() else torch.tensor(1.0)
    matrix += fraction * mean * torch.eye(len(matrix), dtype=torch.float64)
    matrix[dead] = 0
    matrix[:, dead] = 0
    matrix[dead, dead] = 1
    return matrix


def gptq_oracle(
    weight: Tensor,
    format: Format,
    moment: Tensor,
    *,
    damping: float = 0.01,
    by_activity: bool = False,
    static: bool = True,
    fit: Fit = plain_fit,
) -> tuple[Tensor, dict[str, Tensor], float]:
    """Codes (rows, columns), params (rows, blocks, 1) and the sum of the paper's losses."""
    format = format.bind(weight)
    columns = weight.shape[1]
    width = format.block or columns
    span = columns if not format.fit_block or not format.block else format.fit_block
    hessian = damped(moment, damping)
    diagonal = [float(v) for v in moment.diagonal()]
    order = sorted(range(columns), key=lambda i: -diagonal[i]) if by_activity else list(range(columns))
    params = fit(format, weight.float(), slice(0, columns))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    current = weight.double().clone()
    loss = 0.0
    for step, column in enumerate(order):
        if not static and column % span == 0:
            which = slice(column, min(column + span, columns))
            fresh = fit(format, current[:, which].float(), which)
            for name, values in fresh.items():
                params[name] = params[name].clone()
                params[name][:, column // width : column // width + values.shape[1]] = values
        left = torch.tensor(order[step:])
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = {name: values[:, column // width, None] for name, values in params.items()}
        code = format.encode(current[:, column, None, None].float(), here)
        codes[:, column] = code[:, 0, 0]
        error = current[:, column] - format.decode(code, here)[:, 0, 0].double()
        current[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        loss += float((error.square() / inverse[0, 0]).sum())
    return codes, params, loss
