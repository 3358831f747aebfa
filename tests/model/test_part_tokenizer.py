# SPDX-License-Identifier: Apache-2.0
"""A text read with a part of the vocabulary has the tokens that the whole gives, and tokens have the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fewbit.errors import InputError
from fewbit.model import tokenizer_file
from fewbit.model.part_tokenizer import PartTokenizer
from fewbit.model.tokenizer_file import pass_through, read_whole

WORDS = (
    "once upon a time there was the café of Ångström; f(x) = [1, 2], {3: 4}\n\n\tx += '\"],[\"' über 北京 北 naïve 😀😀"
)
SPOKEN = st.sampled_from([*WORDS.split(" "), " ", "<s>", "</s>", "<plain>", "<later>", "  ", "e\u0301", "xx"])
TEXTS = st.lists(st.one_of(SPOKEN, st.text(max_size=4)), max_size=12).map("".join)
SAID = [AddedToken("<later>", special=True), AddedToken("<plain>", special=False, normalized=True)]


def learned(tokenizer: Tokenizer, **settings: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], **settings)
    tokenizer.train_from_iterator([f"{WORDS} {word}{word} {word}" for word in WORDS.split(" ")] * 3, trainer)
    tokenizer.add_tokens(SAID)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level(**model: Any) -> Tokenizer:
    """As that of Qwen."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return learned(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def fallback() -> Tokenizer:
    """As that of Gemma: nothing splits a text, bytes stand for rare characters, and here two of them are joined."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    learned(tokenizer, limit_alphabet=40)
    whole = json.loads(tokenizer.to_str())
    vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
    for name in (*(f"<0x{byte:02X}>" for byte in range(128, 256)), "<0xE2><0x82>"):
        vocabulary[name] = len(vocabulary)
    merges.append(["<0xE2>", "<0x82>"])
    for token in whole["added_tokens"]:  # those that the vocabulary lacks come after it
        token["id"] = vocabulary.get(token["content"], token["id"] + 129)
    return Tokenizer.from_str(json.dumps(whole))


def spaced() -> Tokenizer:
    """As that of Llama 2; what is unknown is left out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return learned(tokenizer, limit_alphabet=30)


def unknown() -> Tokenizer:
    """One of the vocabulary's own tokens stands for what is unknown."""
    whole = json.loads(spaced().to_str())
    whole["model"]["unk_token"] = "e"
    return Tokenizer.from_str(json.dumps(whole))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "whole words": lambda: byte_level(ignore_merges=True),
    "fallback": fallback,
    "spaced": spaced,
    "unknown": unknown,
}
Pair = tuple[Any, tokenizer_file.Passed]


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tokenizer whole, and what is passed through."""
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS[request.param]().save(str(file))
    passed = pass_through(file)
    assert passed is not None
    return read_whole(file), passed


@given(text=TEXTS)
@settings(deadline=None, max_examples=60)
def test_a_text_has_the_same_tokens(both: Pair, text: str) -> None:
    whole, passed = both
    for special in (False, True):
        part = PartTokenizer(passed)
        expected = whole.encode(text, add_special_tokens=special)
        found = part.encode(text, add_special_tokens=special)
        assert (found.ids, found.tokens) == (expected.ids, expected.tokens)
        assert "_whole" not in vars(part)
        assert part.encode(text + "a").ids == whole.encode(text + "a").ids and "_whole" in vars(part)


def test_tokens_have_the_same_names_and_texts(both: Pair) -> None:
    whole, passed = both
    part, size = PartTokenizer(passed), whole.get_vocab_size()
    assert (part.get_vocab_size(), part.get_vocab_size(False)) == (size, whole.get_vocab_size(False))
    for token in range(size + 2):
        assert part.id_to_token(token) == whole.id_to_token(token)
        for skip in (False, True):
            assert part.decode([token], skip_special_tokens=skip) == whole.decode([token], skip_special_tokens=skip)
    for name in ("<s>", "<later>", "<plain>"):
        assert part.token_to_id(name) == whole.token_to_id(name)


@given(numbers=st.lists(st.integers(0, 1000), max_size=30), skip=st.booleans())
@settings(deadline=None, max_examples=60)
def test_many_tokens_have_the_same_text(both: Pair, numbers: list[int], skip: bool) -> None:
    whole, passed = both
    assert PartTokenizer(passed).decode(numbers, skip) == whole.decode(numbers, skip_special_tokens=skip)


def test_a_part_is_small(both: Pair) -> None:
    _, passed = both
    part = PartTokenizer(passed)
    used = part._used_by(part._pieces("once"))
    names = [name for name in used if not name.startswith("<")]
    assert 1 <= len(names) < 20 < len(passed) and len(passed.merges(used)) < 20


@pytest.mark.parametrize("window", [64, 97, 1 << 10])
@pytest.mark.parametrize("layout", [{}, {"indent": 2, "ensure_ascii": False}, {"separators": (",", ":")}])
@pytest.mark.parametrize("strings", [False, True], ids=["pairs", "strings"])
def test_a_file_is_cut_between_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, layout: dict[str, Any], strings: bool
) -> None:
    """Whatever its tokens look like, and wherever it is cut."""
    monkeypatch.setattr(tokenizer_file, "WINDOW", window)
    whole = json.loads(byte_level().to_str())
    odd = ['"],["', '",', "],[", '": 1, "', '}, "merges": [', "]}}", "\\", '\\"', "merges", '"vocab": {', "é\u2028"]
    vocabulary, merges = {**whole["model"]["vocab"]}, whole["model"]["merges"]
    first = len(vocabulary)
    for name in odd:
        for new in (name, name * 2):
            vocabulary.setdefault(new, len(vocabulary))
        merges += [] if " " in name else [[name, name]]
    for token in whole["added_tokens"]:
        token["id"] += len(vocabulary) - first if token["id"] >= first else 0
    whole["model"] |= {"vocab": vocabulary, "merges": [" ".join(pair) for pair in merges] if strings else merges}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(whole, **layout), encoding="utf-8")
    passed = pass_through(file)
    assert passed is not None and len(passed) == len(vocabulary)
    assert {passed.name(token).decode(): token for token in range(len(passed))} == vocabulary
    assert passed.merges(vocabulary) == [tuple(pair) for pair in merges]


def changed(file: Path, **parts: Any) -> Any:
    whole = json.loads(byte_level().to_str())
    for name, value in parts.items():
        (whole["model"] if name in whole["model"] else whole)[name] = value
    file.write_text(json.dumps(whole))
    return whole


@pytest.mark.parametrize(
    "parts",
    [
        {"dropout": 0.5},
        {"end_of_word_suffix": "</w>"},
        {"continuing_subword_prefix": "##"},
        {"type": "WordPiece"},
        {"vocab": {"a": 1, "b": 2}},
        {"vocab": [["a", 0.5]]},
        {"later": 1},
        {"unk_token": "<nowhere>"},
        {"added_tokens": [{"id": 5000, "content": "<x>"}]},
        {"added_tokens": [{"id": 700, "content": ""}]},
        {"added_tokens": None},
    ],
    ids=repr,
)
def test_another_file_is_left_to_the_package(tmp_path: Path, parts: dict[str, Any]) -> None:
    changed(tmp_path / "tokenizer.json", **parts)
    assert pass_through(tmp_path / "tokenizer.json") is None


def test_a_file_that_ends_early_is_none(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    changed(file)
    text = file.read_bytes()
    assert pass_through(file) is not None
    for length in range(0, len(text) - 1, 97):
        file.write_bytes(text[:length])
        assert pass_through(file) is None


@pytest.mark.parametrize("merges", [[["o", "n"], 7], [["o", "n", "c"]], [[["o"], "n"]]], ids=repr)
def test_what_is_no_merge_is_refused(tmp_path: Path, merges: list[Any]) -> None:
    file = tmp_path / "tokenizer.json"
    changed(file, merges=merges)
    passed = pass_through(file)
    assert passed is not None and read_whole(file) is None
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        PartTokenizer(passed).encode("once")
