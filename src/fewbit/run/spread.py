# SPDX-License-Identifier: Apache-2.0
"""What a kernel adds up for every weight: the measure of how far float32 may take it from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms


def spread(weight: QTensor | Term) -> Tensor:
    """Magnitudes float64 (rows, columns), which bound |w|: |scale * code| + |offset| of a matrix; of a sum of terms,
    the sum of theirs; of a product, the product of its factors'."""
    match weight:
        case QTensor():
            _, params = weight.logical()
            physical = weight.format.physical(params)
            return physical.magnitude(weight.dequantize(), weight.format.block or weight.shape[1])
        case Dense():
            return spread(weight.qtensor)
        case Sparse():
            return weight.dequantize().abs().double()
        case Product():
            left = spread(weight.left)
            return (left if weight.middle is None else left * weight.middle.double().abs()) @ spread(weight.right)
        case Columns():
            beside = torch.cat([spread(part) for part in weight.parts], 1)
            return torch.empty_like(beside).index_copy_(1, weight.permutation.long(), beside)
        case Terms():
            total = torch.stack([spread(term) for term in weight.terms]).sum(0)
            rows, columns = weight.row_scale, weight.column_scale
            total = total if rows is None else total * rows.double().abs()[:, None]
            return total if columns is None else total * columns.double().abs()
    raise TypeError(f"{type(weight).__name__} is no weight")
