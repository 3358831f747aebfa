# SPDX-License-Identifier: Apache-2.0
"""A few seconds of ``bench/storm.py``: 50 clients that read, pause, leave and send nonsense."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewbit.decode.batch import Limits

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import storm


@pytest.mark.slow
def test_no_text_is_lost_or_mixed_up(fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storm, "PAUSE", 0.005)
    running = fake(Limits(running=8, kept=4, chunk=32, alone=64), seconds=0.001)
    words, engine = running.served.words, running.served.batcher.engine
    cases = []
    for number in range(30):
        prompt = "the same beginning of all of them " * (number % 3) + f"number {number} " * (1 + number % 5)
        count = 3 + 7 * number % 60
        text = words.decode(engine.after(words.encode(prompt), count))
        cases.append(storm.Case({"model": "fake", "prompt": prompt, "max_tokens": count, "temperature": 0}, text))
    tally = asyncio.run(storm.storm(storm.Server(running.port, "a-token-for-tests"), cases, 50, 4))
    assert tally.wrong == []
    assert set(tally.ways) == set(storm.WAYS) and sum(tally.ways.values()) >= 50  # each client's first already does
    until = time.monotonic() + 20  # the last to leave are noticed a moment later
    while (stats := running.served.batcher.stats()).running + stats.waiting and time.monotonic() < until:
        time.sleep(0.01)
    assert (stats.running, stats.waiting) == (0, 0) and stats.kept <= 12
    assert stats.reused_tokens > 0
    assert running.get("/health").status_code == 200
