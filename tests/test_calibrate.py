# SPDX-License-Identifier: Apache-2.0
"""The first window of a passage, of which no more is read than it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbit import calibrate
from fewbit.errors import InputError

CONTEXT = 16


class Words:
    """A token a word, its length, behind a 1; notes how much it read."""

    bos_token_id = 1

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> Any:
        self.longest = max(self.longest, len(text))
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}


@pytest.mark.parametrize(("word", "whole"), [("an a ", False), ("characteristically long ", True)])
def test_a_passage_is_read_as_far_as_its_window_needs(word: str, whole: bool) -> None:
    passage, words = word * 200, Words()
    found = calibrate.first_window(words, passage, CONTEXT, "text")
    assert (words.longest == len(passage)) == whole
    assert torch.equal(found, calibrate.windows(Words(), passage, CONTEXT, "text")[0])


def test_a_passage_with_too_few_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="it has 3 tokens"):
        calibrate.first_window(Words(), "a b c", CONTEXT, "text")
