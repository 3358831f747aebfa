# SPDX-License-Identifier: Apache-2.0
"""Text that comes token by token is the text that all tokens give; stop strings; ends; templates in the sandbox."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.decode.text import PENDING, StopStrings, TextStream, Words, ends_of, words_of
from fewbit.errors import InputError
from fewbit.model.part_tokenizer import PartTokenizer

ASSETS = Path("/work/shared/assets")
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a é€𝄞\n")), max_size=40)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[Path], int]) -> Words:
    folder = tmp_path_factory.mktemp("words")
    byte_tokenizer(folder)
    return words_of(folder)


@pytest.fixture(scope="session")
def pieces() -> Words:
    """A SentencePiece tokenizer: spaces belong to words, rare characters are bytes."""
    if not (ASSETS / "stories15m" / "tokenizer.json").is_file():
        pytest.skip("the shared model stories15m is not here")
    return words_of(ASSETS / "stories15m")


def streamed(words: Words, before: list[int], tokens: list[int]) -> list[str]:
    stream = words.stream(before)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("kind", ["words", "pieces"])
@given(before=TEXTS, text=TEXTS)
@settings(deadline=None, max_examples=200)
def test_a_streamed_text_is_the_whole_text(kind: str, before: str, text: str, request: pytest.FixtureRequest) -> None:
    words: Words = request.getfixturevalue(kind)
    tokens = words.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = words.tokenizer(before, add_special_tokens=False)["input_ids"]
    parts = streamed(words, [], tokens)
    assert "".join(parts) == words.decode(tokens)
    shown = "".join(streamed(words, prompt, tokens))
    assert words.decode([*prompt, *tokens]).endswith(shown) and len(shown) >= len(words.decode(tokens))
    for part in parts:
        part.encode()  # no half of a surrogate pair
        assert ("�" in part) <= ("�" in text)


@pytest.mark.parametrize("kind", ["words", "pieces"])
@given(text=TEXTS.filter(lambda text: text and "s>" not in text))  # special tokens are left out of a text
@settings(deadline=None, max_examples=200)
def test_bytes_of_tokens_make_the_text(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    """Whatever parts of characters a token holds; SentencePiece puts a space before the first word."""
    words: Words = request.getfixturevalue(kind)
    tokens = words.tokenizer(text, add_special_tokens=False)["input_ids"]
    space = " " if kind == "pieces" else ""
    assert b"".join(map(words.bytes_of, tokens)) == (space + words.decode(tokens)).encode()


def test_pieces_of_tokens(pieces: Words) -> None:
    tokens = pieces.tokenizer("Once 😀", add_special_tokens=False)["input_ids"]
    assert [pieces.piece(token) for token in tokens] == [" Once", " ", *(f"bytes:\\x{b:02x}" for b in "😀".encode())]
    assert pieces.piece(1) == "<s>"


@given(tokens=st.lists(st.integers(0, 257), max_size=120))
@settings(deadline=None, max_examples=200)
def test_bytes_that_are_no_text_are_not_held_for_ever(words: Words, tokens: list[int]) -> None:
    stream, held = words.stream(), 0
    for token in tokens:
        held = 0 if stream.push(token) else held + 1
        assert held <= PENDING
    stream.finish()
    assert stream.finish() == ""


def test_junk_is_shown_after_a_while(words: Words) -> None:
    shown = streamed(words, [], [words.encode("€")[1]] * 100)  # no character goes on without having begun
    assert "".join(shown) == "�" * 100
    assert shown.index(next(filter(None, shown))) == PENDING - 1


def test_a_character_comes_whole(words: Words) -> None:
    tokens = words.encode("€a")
    assert len(tokens) == 4
    assert streamed(words, [], tokens) == ["", "", "€", "a", ""]
    assert streamed(words, [], tokens[:2]) == ["", "", "�"]


def test_the_first_space_after_a_prompt_is_kept(pieces: Words) -> None:
    prompt, tokens = pieces.encode("Once upon"), pieces.tokenizer("a time", add_special_tokens=False)["input_ids"]
    assert "".join(streamed(pieces, prompt, tokens)) == " a time"
    assert "".join(streamed(pieces, [], tokens)) == "a time"


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_a_prompt_is_read_alike_by_a_part_of_the_vocabulary(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, byte_tokenizer: Callable[[Path], int]
) -> None:
    words: Words = request.getfixturevalue(kind)
    byte_tokenizer(tmp_path)
    folder = tmp_path if kind == "words" else ASSETS / "stories15m"
    for prompt in ("Once upon a time", "</s>€ a<s>  b 😀\n", ""):
        once = words_of(folder, once=True)
        assert isinstance(once.tokenizer._tokenizer, PartTokenizer) and once.ends == words.ends
        tokens = words.encode(prompt)
        assert once.encode(prompt) == tokens == once.encode(prompt)
        assert streamed(once, tokens, tokens * 2) == streamed(words, tokens, tokens * 2)
        assert [once.piece(token) for token in tokens] == [words.piece(token) for token in tokens]


def test_special_tokens_are_not_shown(words: Words) -> None:
    assert "".join(streamed(words, [], [0, *words.encode("hi"), 1])) == "hi"
    assert words.piece(1) == "</s>"


def test_a_long_text_keeps_only_its_end() -> None:
    def decode(tokens: Any) -> str:
        assert len(tokens) < 4 * PENDING
        return "".join(map(chr, tokens))

    stream = TextStream(decode)
    assert "".join(stream.push(97 + n % 26) for n in range(5000))[-3:] == "fgh"
    assert len(stream._tokens) < 8 * PENDING


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
@settings(deadline=None)
def test_a_text_ends_before_its_first_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stream, shown = StopStrings(stops), ""
    for begin, end in itertools.pairwise(places):
        shown += stream.push(text[begin:end])
        held = text[:end][len(shown) :]
        assert stream.stopped or all(len(held) < len(stop) for stop in stops if stop.startswith(held) and held)
    shown += stream.finish()
    # Of several stop strings the one that is complete first ends the text.
    ends = [text[:end] for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert shown == text and not stream.stopped
    else:
        assert stream.stopped
        assert any(text.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)


def test_ends_come_from_both_configs(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert ends_of(tmp_path) == {2, 3, 7}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json"):
        ends_of(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="copy the original's tokenizer"):
        words_of(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        words_of(tmp_path / "none")


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    """By the package tokenizers, which raises bare exceptions."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(InputError, match=r"invalid type.*whole"):
        words_of(tmp_path)


def with_template(words: Words, template: str | None, monkeypatch: pytest.MonkeyPatch) -> Words:
    monkeypatch.setattr(words.tokenizer, "chat_template", template, raising=False)
    return words


def test_a_template_makes_the_prompt(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = with_template(words, PLAIN, monkeypatch)
    tokens = chat.chat([{"role": "system", "content": "be €"}, {"role": "user", "content": "hi"}])
    assert words.decode(tokens) == "<system>be €<user>hi<assistant>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ nothing.here }}",
        "{% if %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(words: Words, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = with_template(words, template, monkeypatch)
    with pytest.raises(InputError, match="chat template"):
        chat.chat([{"role": "user", "content": "hi"}])


def test_a_missing_template_is_said(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = with_template(words, None, monkeypatch)
    with pytest.raises(InputError, match="plain completions would work"):
        chat.chat([{"role": "user", "content": "hi"}])


def test_half_a_surrogate_pair_is_no_text(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="surrogate"):
        words.encode("a\ud800")
    with pytest.raises(InputError, match="surrogate"):
        with_template(words, PLAIN, monkeypatch).chat([{"role": "user", "content": "\udc00"}])
