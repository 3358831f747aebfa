# SPDX-License-Identifier: Apache-2.0
"""Hooks that modules have for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While open, modules have the hooks of ``handles``. Afterwards they have none of them, and so where making one,
    which may happen as it is asked for, raises."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield
