# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``kind`` says what, and which other fields mean something:

    * "start": ``blocks`` known. "done": everything is written and checked. "note": ``message`` is for the user.
    * "layer": ``name`` is solved: relative output ``error``, true ``bits`` per weight, ``seconds``; ``message`` or "".
    * "block": ``block`` of ``blocks`` is written; ``eta_seconds`` left.
    * "step": as much of what the whole model learns is done: step ``block`` of ``blocks``; ``message`` now and then.

    ``peak_rss_bytes`` is the peak of this process so far.
    """

    kind: Literal["start", "layer", "block", "step", "note", "done"]
    name: str = ""
    block: int = 0
    blocks: int = 0
    error: float | None = None
    bits: float | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    eta_seconds: float | None = None
    message: str = ""


Progress = Callable[[Event], None]
