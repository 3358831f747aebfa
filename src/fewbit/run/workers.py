# SPDX-License-Identifier: Apache-2.0
"""Parallel work with the same bits at any thread count.

Every unit of work (a batch through a block, a layer to solve) runs on one thread of torch from start to end, and
results are consumed in the order of the inputs. How many units run at once therefore changes the time and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from fewbit.memory import keep

A = TypeVar("A")
R = TypeVar("R")


class Workers:
    """A pool of ``threads`` workers, each computing with one torch thread. Made by :func:`workers`."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self._pool, self.threads = pool, threads

    def start(self, function: Callable[[], R]) -> Future[R]:
        """Begin ``function``; its result, or what it raised, is awaited by the caller."""
        return self._pool.submit(function)

    def map(self, function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
        """``function`` of every item, in order, with at most ``threads + 1`` results waiting (bounded memory)."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _alone() -> None:
    """Of each worker thread: torch keeps both settings per thread."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


@contextmanager
def workers(threads: int | None) -> Iterator[Workers]:
    """Open a pool; the caller's torch thread count is put back on exit. ``None`` takes that count."""
    keep()
    before = torch.get_num_threads()
    number = max(1, threads or before)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(number, thread_name_prefix="fewbit", initializer=_alone)
    try:
        with torch.no_grad():
            yield Workers(pool, number)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
