# SPDX-License-Identifier: Apache-2.0
"""What a kernel adds up for every weight: the measure of how far float32 may take it from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms


def spread(weight: QTensor | Term, x: Tensor) -> Tensor:
    """``x`` (tokens, columns), not negative, times magnitudes (rows, columns) that bound |w|: (tokens, rows).
    |scale * code| + |offset| of a matrix; of a sum of terms, the sum of theirs; of a product, the product of its
    factors'. In the precision of ``x``, which is enough of a bound."""
    match weight:
        case QTensor():
            _, params = weight.logical()
            physical = weight.format.physical(params)
            return physical.added(weight.dequantize(), weight.format.block or weight.shape[1], x)
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
