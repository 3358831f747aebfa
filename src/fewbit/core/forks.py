# SPDX-License-Identifier: Apache-2.0
"""Locks that forked children can take."""

from __future__ import annotations

import os
import threading


def lock() -> threading.Lock:
    """A lock that is free in a child: without the thread that holds it there, the child would wait for it for ever."""
    made = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=made.acquire, after_in_parent=made.release, after_in_child=made.release)
    return made
