# SPDX-License-Identifier: Apache-2.0
"""Memory that is free goes back to the system at once."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
"""The parameter's number in glibc's malloc.h."""
LARGE = 1 << 22
"""Bytes from which on a block of memory is the system's own, taken and given back as a whole."""


def return_large_blocks() -> None:
    """Keep large tensors out of malloc's own pools, for the rest of the process; does nothing but under glibc.

    Left alone, glibc serves ever larger blocks from its pools, one a thread, as it sees them freed: activations of many
    shapes leave holes there, and a run over many blocks ends up with twice the memory that it uses.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)
    except (OSError, TypeError, AttributeError):
        return  # no C library by that name (Windows), or none with mallopt (macOS, musl)
