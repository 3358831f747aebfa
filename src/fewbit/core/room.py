# SPDX-License-Identifier: Apache-2.0
"""Memory of large matrices: to fault it in takes longer than much of what is done with it, so it is taken in large
pages, or not at all where some rows at a time will do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core import compiled

LARGE = 8 << 20
"""Bytes of a block from which on most of it lies in whole large pages, of 2 MiB, wherever it begins."""
TOGETHER = 1 << 18
"""Weights of a large matrix that are worked on together: what is made of them, 1 MiB each time, stays in a core's
cache."""


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized array (``shape``) on the CPU; a large one in large pages where the system has them."""
    made = torch.empty(shape, dtype=dtype, device="cpu")
    if made.nbytes >= LARGE and (native := compiled.load()[0]) is not None:
        native.large_pages(made.data_ptr(), made.nbytes)
    return made


def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``: themselves where they are in it."""
    return values if values.dtype == dtype else room(tuple(values.shape), dtype).copy_(values)


def times(x: Tensor, made: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """``x`` (tokens, columns) times what ``made`` makes of ``matrices`` (rows, columns), row by row, transposed:
    (tokens, rows)."""
    rows = max(1, TOGETHER // max(1, matrices[0].shape[1]))
    parts = [x @ made(*part).T for part in zip(*(matrix.split(rows) for matrix in matrices), strict=True)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
