# SPDX-License-Identifier: Apache-2.0
"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return what malloc keeps of freed memory; does nothing but under glibc.

    Activations of many shapes leave holes in its pools, one a thread: left alone, a run over many blocks ends up with
    twice the memory that it uses.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        return  # no C library by that name (Windows), or none with malloc_trim (macOS, musl)
