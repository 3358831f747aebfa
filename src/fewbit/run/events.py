# SPDX-License-Identifier: Apache-2.0
"""What a run tells while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    ``kind``: "start" (``blocks`` known), "layer" (``name`` solved: ``error`` relative output error, ``bits`` true bits
    per weight, ``seconds``), "block" (``block`` of ``blocks`` written; ``eta_seconds``), "note" (``message`` for the user),
    "done". ``peak_rss_bytes`` is the peak of this process so far.
    """

    kind: Literal["start", "layer", "block", "note", "done"]
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
