# SPDX-License-Identifier: Apache-2.0
"""Sentences of the commands that write text, whose memory is counted: without rich, which takes 2 MiB."""

from __future__ import annotations

import sys


def note(sentence: str) -> None:
    """On stderr, in one line."""
    print(sentence, file=sys.stderr, flush=True)
