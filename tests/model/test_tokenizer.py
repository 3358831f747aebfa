# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is read from takes less memory than its file, and gives the same tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from fewbit.model.tokenizer_file import _on_lines, _pair_by_pair, lean

SYMBOLS = ["a", "b", "c", "#", '"', "\\", "é", "\u2581", "[", "]", ","]
PAIRS = [["a", "b"], ["ab", "c"], ["#", "#"], ['"', "\\"], ["é", "\u2581"], ["[", "]"], ["]", ","]]


def described(pairs: list[list[str]], **layout: Any) -> bytes:
    """A ``tokenizer.json`` of ``pairs``, which makes what they join."""
    vocabulary = dict.fromkeys([*SYMBOLS, *(text for pair in pairs for text in (*pair, "".join(pair))), "merges"])
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: place for place, text in enumerate(vocabulary)},
        "merges": pairs,
    }
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    whole = {"version": "1.0", **dict.fromkeys(parts), "added_tokens": [], "model": model}
    return json.dumps(whole, **layout).encode()


@pytest.mark.parametrize(
    "layout", [{}, {"indent": 2, "ensure_ascii": False}, {"separators": (",", ":")}], ids=["plain", "indented", "close"]
)
def test_the_tokenizer_is_the_same(layout: dict[str, Any]) -> None:
    text = described(PAIRS, **layout)
    found = lean(text)
    assert len(found) < len(text) and json.loads(found)["model"]["merges"] == [" ".join(pair) for pair in PAIRS]
    assert Tokenizer.from_buffer(found).to_str() == Tokenizer.from_buffer(text).to_str()
    assert lean(found) == found


@pytest.mark.parametrize("pair", [["a ", "b"], ["a", " "], ["#version", "b"], ["#vers", "ion"]], ids=repr)
def test_merges_that_a_string_cannot_hold_stay_pairs(pair: list[str]) -> None:
    for layout in ({}, {"indent": 1}):
        text = described([*PAIRS, pair], **layout)
        Tokenizer.from_buffer(text)
        found = lean(text)
        assert Tokenizer.from_buffer(found).to_str() == Tokenizer.from_buffer(text).to_str()
        assert (found == text) == (pair != ["#vers", "ion"])
    escaped = text.replace(b'"a "', b'"a\\u0020"')
    assert lean(escaped) == escaped or pair[0] != "a "


@pytest.mark.parametrize(
    "text", [b"", b'{"merges": [["a", "b"]', b'{"merges": [["a", "b"], ["c"]]}', b'{"merges": []}']
)
def test_what_is_no_list_of_pairs_is_left_alone(text: bytes) -> None:
    assert lean(text) == text


@pytest.mark.parametrize("pairs", [[["a", "b", "c"], ["d"]], [["a"], ["b", "c", "d"]], [["a", "b"], ["c"], ["d", "e"]]])
def test_lists_on_lines_that_are_no_pairs_are_left_alone(pairs: list[list[str]]) -> None:
    text = described([["a", "b"], ["b", "c"], *pairs], indent=2)
    assert lean(text) == text


def test_pairs_on_lines_are_those_found_one_by_one() -> None:
    text = described([*PAIRS, ["\\", "n"], ['",', '"'], ['"]', ',["']], indent=2, ensure_ascii=False)
    at = text.index(b'"merges": [') + len(b'"merges": [')
    at = text.index(b"[", at)
    found = _on_lines(text, at)
    assert found is not None and found == _pair_by_pair(text, at)
    assert _on_lines(text.replace(b'"a",\n', b'"\na",\n'), at) is None  # an end of a line within a string
    assert _on_lines(text.replace(b'"ab",\n', b'"ab" ,\n'), at) is None  # not all in one way
