# SPDX-License-Identifier: Apache-2.0
"""Rows timed in one loop, so that a noisy moment hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from peers.row import Call


def interleaved(
    calls: list[list[Call]], seconds: float, pause: float, warm: bool, clock: Callable[[], float], least: int = 3
) -> list[list[float]]:
    """Seconds of every call: rounds of one call a row, each row rotating through its own, until time is up. The order
    is another in each round: what a row leaves behind (caches, page tables, threads that still spin) meets every other.

    ``warm``: a call that is not timed goes before each, on the row's next weights, as in a model a layer follows
    another: what is timed finds its code in the caches, of which Python's takes up to 0.1 ms, and its weights only
    where there is one copy of them. A row that has had three times its share of ``seconds`` sits out the rounds after
    the first ``least``.
    """
    found: list[list[float]] = [[] for _ in calls]
    for each in calls:
        each[0]()
    stop, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or turn < least:
        for row in random.Random(turn).sample(range(len(calls)), len(calls)):
            each, times = calls[row], found[row]
            if turn >= least and sum(times) > 3 * seconds / len(calls):
                continue
            time.sleep(pause)
            if warm:
                each[(turn + 1) % len(each)]()
            start = clock()
            each[turn % len(each)]()
            times.append(clock() - start)
        turn += 1
    return found
