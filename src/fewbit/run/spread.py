# SPDX-License-Identifier: Apache-2.0
"""What a kernel adds up for every weight, and levels that it rounds: how far they may take it from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit import kernels
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms


def spread(weight: QTensor | Term, x: Tensor, decoded: Tensor | None = None) -> Tensor:
    """``x`` (tokens, columns), not negative, times magnitudes (rows, columns) that bound |w|: (tokens, rows).
    |scale * code| + |offset| of a matrix; of a sum of terms, the sum of theirs; of a product, the product of its
    factors'. In the precision of ``x``, which is enough of a bound. ``decoded``: the matrix that ``weight`` stands for,
    where that is at hand."""
    match weight:
        case QTensor():
            _, params = weight.logical()
            physical = weight.format.physical(params)
            values = weight.dequantize() if decoded is None else decoded
            return physical.added(values, weight.format.block or weight.shape[1], x)
        case Dense():
            return spread(weight.qtensor, x)
        case Sparse():
            return x @ weight.dequantize().abs().T
        case Product():
            inner = spread(weight.right, x)
            return spread(weight.left, inner if weight.middle is None else inner * weight.middle.abs())
        case Columns():
            beside = x[:, weight.permutation.long()].split([part.shape[1] for part in weight.parts], 1)
            return torch.stack([spread(*pair) for pair in zip(weight.parts, beside, strict=True)]).sum(0)
        case Terms():
            rows, columns = weight.row_scale, weight.column_scale
            scaled = x if columns is None else x * columns.abs()
            total = torch.stack([spread(term, scaled) for term in weight.terms]).sum(0)
            return total if rows is None else total * rows.abs()
    raise TypeError(f"{type(weight).__name__} is no weight")


def level_rounding(weight: QTensor | Terms, x: Tensor, activation: Format | None) -> Tensor:
    """What is missed at most at inputs ``x`` (tokens, columns), not negative, as the kernel that runs ``weight`` for
    inputs rounded to ``activation`` keeps levels as integers: (tokens, rows). (Sums of terms round no inputs.)"""
    if activation is None or not isinstance(weight, QTensor):
        return x.new_zeros(len(x), weight.shape[0])
    kernel = kernels.choose(weight.format, weight.shape, activation=activation).kernel
    physical = weight.format.physical(weight.logical()[1])
    return kernel.level_error(weight.format) * physical.largest(weight.shape, weight.format.block or weight.shape[1], x)
