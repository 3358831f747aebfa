# SPDX-License-Identifier: Apache-2.0
"""Pieces of a text name the tokens that they are of, whatever was held back meanwhile."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fewbit.decode.job import Job, Piece
from fewbit.decode.sampling import Sampler, Sampling
from fewbit.decode.text import TextStream

NAMES = [b"", b"ab", b"cd", b"ef", b"\xf0\x9f", b"\x99\x82", b"<e>"]
SPECIAL, END = 0, 6


class Words:
    """As much of a tokenizer as a job asks."""

    ends = frozenset({END})

    def stream(self, before: Any) -> TextStream:
        return TextStream(lambda tokens: b"".join(NAMES[token] for token in tokens).decode(errors="replace"))


def pieces(tokens: list[int], *stop: str) -> list[tuple[str, list[int]]]:
    """(text, tokens) of each piece of a text that is ``tokens``, or as many as come before its end."""
    seen: list[Piece] = []
    sampler = Sampler(Sampling(stop=stop, max_tokens=len(tokens)), [1], len(NAMES))
    job = Job([1], sampler, cast(Any, Words()), seen.append, len(tokens))
    for token in tokens:
        if job.take(token, None):
            break
    assert seen[-1].last and not any(piece.last for piece in seen[:-1])
    return [(piece.text, [token for token, _ in piece.tokens]) for piece in seen]


@pytest.mark.parametrize(
    ("tokens", "stop", "found"),
    [
        ([1, 2, 3], ["never"], [("ab", [1]), ("cd", [2]), ("ef", [3])]),
        ([1, 2, 3], ["cdef"], [("ab", [1]), ("", [])]),  # none of a stop string
        ([1, 2, 3], ["def"], [("ab", [1]), ("c", [2]), ("", [])]),  # but one that begins before it
        ([1, 2, 3], ["b"], [("a", [1])]),
        ([1, 2, 1], ["cdef"], [("ab", [1]), ("cdab", [2, 1])]),  # what was held back comes when it is shown
        ([1, 2], ["cdef"], [("ab", [1]), ("cd", [2])]),
        ([1, 4, 5, 2], [], [("ab", [1]), ("\U0001f642", [4, 5]), ("cd", [2])]),  # halves of a character together
        ([1, 4, 5, 2], ["\U0001f642"], [("ab", [1]), ("", [])]),
        ([1, 4], [], [("ab", [1]), ("\ufffd", [4])]),
        ([1, SPECIAL, 2, SPECIAL, END], [], [("ab", [1]), ("cd", [SPECIAL, 2]), ("", [SPECIAL])]),
    ],
)
def test_tokens_come_with_their_text(tokens: list[int], stop: list[str], found: list[tuple[str, list[int]]]) -> None:
    assert pieces(tokens, *stop) == found
