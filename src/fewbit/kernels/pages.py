# SPDX-License-Identifier: Apache-2.0
"""Memory for what kernels read again and again: arrays side by side in large pages. Where these lie, a processor can
remember; where the many small pages of a model lie, it cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.core.forks import lock
from fewbit.kernels import native

CHUNK = 16 << 20
"""Bytes that are asked of the system at a time. They take memory page by page, as arrays fill them, and are given back
when the last array in them is gone."""
PAGE = 2 << 20
LINE = 64


class _Chunk:
    """Memory of which no byte has been used beyond ``used``."""

    def __init__(self, nbytes: int) -> None:
        whole = fresh(nbytes + PAGE, dtype=torch.uint8)
        begin = -whole.data_ptr() % PAGE
        self.memory = whole[begin : begin + nbytes]
        self.used = 0
        if native.available():
            native.core().large_pages(self.memory.data_ptr(), nbytes)

    def take(self, nbytes: int) -> Tensor | None:
        begin = -(-self.used // LINE) * LINE
        if begin + nbytes > self.memory.numel():
            return None
        self.used = begin + nbytes
        return self.memory[begin : self.used]


_open: list[_Chunk] = []
_lock = lock()


def empty(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """An uninitialized, contiguous array (``shape``) that begins with a cache line."""
    nbytes = math.prod(shape) * dtype.itemsize
    with _lock:
        found = _open[0].take(nbytes) if _open and nbytes < CHUNK else None
        if found is None:
            chunk = _Chunk(max(nbytes, CHUNK))
            found = chunk.take(nbytes)
            assert found is not None
            if nbytes < CHUNK:
                _open[:] = [chunk]
    return found.view(dtype).reshape(tuple(shape))


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialized array (``shape``) that the core writes: of this dtype and on the CPU, whatever torch's defaults
    are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def held(values: Tensor) -> Tensor:
    """A copy there."""
    return empty(values.shape, values.dtype).copy_(values)
