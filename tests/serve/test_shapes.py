# SPDX-License-Identifier: Apache-2.0
"""Where tokens of an echoed prompt begin in its text."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fewbit.decode.sampling import Logprobs
from fewbit.serve.shapes import Shape

PIECES = {1: b"<s>", 2: b" Once", 3: b" up", 4: "é".encode(), 5: b"\xf0\x9f", 6: b"\x99\x82", 7: b"!"}


class Pieces:
    """As much of a tokenizer as a shape asks."""

    def bytes_of(self, token: int) -> bytes:
        return PIECES[token]

    def piece(self, token: int) -> str:
        return PIECES[token].decode(errors="replace")


@pytest.mark.parametrize(
    ("prompt", "text", "offsets"),
    [
        ([1, 2, 3, 4], "Once upé", [0, 0, 4, 7]),  # neither the first token nor the first space is in the text
        ([3, 4, 7], " upé!", [0, 3, 4]),
        ([7, 5, 6, 7], "!🙂!", [0, 1, 2, 2]),
        ([7], "! that a tokenizer drops", [0]),
    ],
)
def test_offsets_count_characters_of_the_text(prompt: list[int], text: str, offsets: list[int]) -> None:
    shape = Shape(False, "m", cast(Any, Pieces()))
    found = shape.echo(prompt, [Logprobs(-1.0, ()) for _ in prompt[1:]], text)
    assert found["text_offset"] == offsets
    assert found["token_logprobs"] == [None] + [-1.0] * (len(prompt) - 1)
