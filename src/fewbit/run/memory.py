# SPDX-License-Identifier: Apache-2.0
"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import math

LITTLE = 256 << 20
"""Free bytes that are not worth the trip: to fault as many in again takes a tenth of a second."""


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc; ``fordblks`` are the bytes that are free."""

    _fields_ = [("before", ctypes.c_size_t * 8), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def give_back() -> None:
    """Return what malloc keeps of freed memory, where it is more than :data:`LITTLE`; does nothing but under glibc.

    Activations of many shapes leave holes in its pools, one a thread: left alone, a run over many blocks ends up with
    twice the memory that it uses.
    """
    try:
        library = ctypes.CDLL(None)
        if _free(library) > LITTLE:
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
