# SPDX-License-Identifier: Apache-2.0
"""What one pass over many numbers tells: sums of columns, and whether all are finite."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from fewbit.core import compiled

STRETCH = 64
"""Rows that are added up before their sum joins the others': ``FEWBIT_STRETCH`` of ``csrc/include/fewbit_grids.h``."""


def column_sums(x: Tensor) -> Tensor:
    """Sums of x, x^2 and |x|, and the largest |x|, of each column of float32 ``x`` (rows, columns): (4, columns), zeros
    for no rows. Where a number is NaN, so is the largest. To the bit what :func:`plain_column_sums` gives."""
    native = compiled.grids()
    if native is None or not x.is_cpu:
        return plain_column_sums(x)
    (rows, columns), x = x.shape, x.contiguous()
    sums = x.new_empty(4, columns)
    native.column_sums((rows, columns), x.data_ptr(), sums.data_ptr(), compiled.BEST)
    return sums


def plain_column_sums(x: Tensor) -> Tensor:
    """:func:`column_sums` by torch: row after row of a stretch, then stretch after stretch."""
    if not len(x):
        return x.new_zeros(4, x.shape[1])
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % STRETCH)).reshape(-1, STRETCH, x.shape[1])
    sums = [_added(_added(part.unbind(1)).unbind()) for part in (padded, padded.square(), padded.abs())]
    return torch.stack([*sums, x.abs().amax(0)])


def _added(parts: Iterable[Tensor]) -> Tensor:
    """One after another."""
    return reduce(torch.add, parts)


def all_finite(values: Tensor) -> bool:
    """Whether none is NaN or infinite. A sum of finite numbers hardly ever overflows: only then each is looked at."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
