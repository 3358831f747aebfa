# SPDX-License-Identifier: Apache-2.0
"""Memory for what is larger than malloc keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import compiled

LARGE = 32 << 20
"""Bytes from which on a block is taken from the system and given back each time: glibc's limit
(:mod:`fewbit.memory`)."""


def room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized array (``shape``) on the CPU; a large one in large pages where the system has them: faulting in
    small ones takes longer than reading a model's embedding into it."""
    made = torch.empty(shape, dtype=dtype, device="cpu")
    if made.nbytes >= LARGE and (native := compiled.load()[0]) is not None:
        native.large_pages(made.data_ptr(), made.nbytes)
    return made


def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``: themselves where they are in it."""
    return values if values.dtype == dtype else room(tuple(values.shape), dtype).copy_(values)
