# SPDX-License-Identifier: Apache-2.0
"""Memory that is free: kept while it is about to be used again, and given back to the system where it is much."""

from __future__ import annotations

import ctypes
import math

LITTLE = 256 << 20
"""Free bytes that are not worth the trip: to fault as many in again takes a tenth of a second."""
LARGEST = (32 << 20) - (64 << 10)
"""Bytes of the largest block that malloc learns from: glibc's limit is 32 MiB, less what it adds to a block itself."""


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc; ``fordblks`` are the bytes that are free."""

    _fields_ = [("before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def keep() -> None:
    """Let malloc keep freed blocks as large as activations of a batch, in place of faulting each in again.

    glibc learns from what is freed: blocks up to the largest one that it gave back to the system so far come from its
    pools from then on, and of a pool's end it keeps twice as much. That would happen in the course of a run, block by
    larger block; this frees the largest that counts, whose pages were never touched. Where malloc is another one, or
    its limits are set by hand, nothing changes.
    """
    import torch  # what only runs a model does without

    torch.empty(LARGEST, dtype=torch.uint8)


def give_back(least: int = LITTLE) -> None:
    """Return what malloc keeps of freed memory, where it is more than ``least`` bytes; does nothing but under glibc.

    Activations of many shapes leave holes in its pools, one a thread: left alone, a run over many blocks ends up with
    twice the memory that it uses.
    """
    try:
        library = ctypes.CDLL(None)
        if _free(library) > least:
            library.malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        return  # no C library by that name (Windows), or none with malloc_trim (macOS, musl)


def _free(library: ctypes.CDLL) -> float:
    """Bytes that malloc keeps; infinite where it does not say (glibc before 2.33)."""
    try:
        library.mallinfo2.restype = _Mallinfo
    except AttributeError:
        return math.inf
    return int(library.mallinfo2().fordblks)
