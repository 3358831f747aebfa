# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that takes transformers once is read without it afterwards, alike, until something changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.decode import kept_tokenizer
from fewbit.decode.opened import FOLDER
from fewbit.decode.text import Words, words_of
from fewbit.model.part_tokenizer import PartTokenizer
from fewbit.model.tokenizer import FileTokenizer

TEMPLATE = "{% for m in messages %}{{ eos_token }}{{ m.content }}{{ image_token }}{% endfor %}"
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the A\u030a 12\n")), max_size=40)


def make(folder: Path, **more: Any) -> Path:
    """A folder with a tokenizer of Qwen's class, whose file alone does not say what that makes of it."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), "th", "the", "\u0120the", "12"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("1", "2")]
    extra = {"image_token": "<image>"}
    made = Qwen2Tokenizer(vocab, merges, chat_template=TEMPLATE, extra_special_tokens=extra, **more)
    made.save_pretrained(folder)
    (folder / "fewbit.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Words, Words]:
    """By transformers, and as it was kept."""
    folder = make(tmp_path_factory.mktemp("qwen"))
    first, second = words_of(folder), words_of(folder)
    assert type(first.tokenizer).__name__ == "Qwen2Tokenizer" and isinstance(second.tokenizer, FileTokenizer)
    return first, second


@given(TEXTS)
@settings(deadline=None, max_examples=200)
def test_it_reads_and_writes_alike(both: tuple[Words, Words], text: str) -> None:
    first, second = both
    tokens = first.encode(text)
    assert second.encode(text) == tokens and second.decode(tokens) == first.decode(tokens)


def test_chats_and_ends_are_alike(both: tuple[Words, Words]) -> None:
    first, second = both
    messages = [{"role": "user", "content": "the 12"}]
    assert second.chat(messages) == first.chat(messages)
    assert second.tokenizer.special_tokens_map == first.tokenizer.special_tokens_map
    assert second.ends == first.ends and len(second.tokenizer) == len(first.tokenizer)
    assert second.tokenizer.decode(second.chat(messages)).endswith("<image>")


def test_one_prompt_takes_a_part_of_it(tmp_path: Path) -> None:
    expected = words_of(make(tmp_path)).encode("the 12")
    again = words_of(tmp_path, once=True)
    assert isinstance(again.tokenizer._tokenizer, PartTokenizer) and again.encode("the 12") == expected


@pytest.mark.parametrize("changed", ["config", "file", "kept", "record", "package"])
def test_what_changed_is_made_anew(tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words_of(make(tmp_path))
    beside = tmp_path / "tokenizer_config.json"
    if changed == "config":
        beside.write_text(json.dumps(json.loads(beside.read_text()) | {"add_prefix_space": True}))
    elif changed == "file":
        file = tmp_path / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
    elif changed == "kept":
        (tmp_path / FOLDER / kept_tokenizer.FILE).write_text("{}")
    elif changed == "record":
        (tmp_path / FOLDER / kept_tokenizer.BESIDE).write_text("[")
    else:
        monkeypatch.setattr(kept_tokenizer, "state_of", lambda path: [1, 2])
    assert type(words_of(tmp_path).tokenizer).__name__ == "Qwen2Tokenizer"
    assert isinstance(words_of(tmp_path).tokenizer, FileTokenizer)


def test_only_folders_of_ours_keep_it(tmp_path: Path) -> None:
    (make(tmp_path) / "fewbit.json").unlink()
    words_of(tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_what_the_package_alone_does_not_say_is_not_kept(tmp_path: Path) -> None:
    words_of(make(tmp_path, split_special_tokens=True))
    assert not (tmp_path / FOLDER).exists()


def test_what_would_be_read_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import normalizers

    make(tmp_path)
    read = kept_tokenizer.read_file

    def otherwise(*asked: Any, **more: Any) -> FileTokenizer | None:
        found = read(*asked, **more)
        assert found is not None
        found._tokenizer.normalizer = normalizers.NFD()
        return found

    monkeypatch.setattr(kept_tokenizer, "read_file", otherwise)
    for _ in range(2):
        assert type(words_of(tmp_path).tokenizer).__name__ == "Qwen2Tokenizer"
    assert not (tmp_path / FOLDER / kept_tokenizer.FILE).exists()


def test_a_folder_that_cannot_be_written_works(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / FOLDER).write_text("no folder")
    assert words_of(tmp_path).encode("the") == words_of(tmp_path).encode("the")
