# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for one text, of which the package tokenizers holds the part of the vocabulary that this text can use.

Byte-pair encoding begins with the characters of a piece of text, or with bytes of those that it does not know, and
joins neighbours; so whatever it makes is a part of that piece, or of tokens for bytes. All other tokens, and merges
with one of them, can be left out: the rest keep their order, and the package finds the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fewbit.errors import InputError
from fewbit.model.tokenizer_file import Passed, pass_through, read_whole

APART = b"\xff"
"""A byte that no text in UTF-8 has, between pieces."""
BYTE = b"<0x"
"""How tokens for bytes begin."""
GRAM = 6
"""Bytes at either end of a token that a text must hold. Of longer ones a fifth is kept in vain, in the tokenizers of
Qwen 3 and Gemma 3, for texts of 200 to 200,000 characters; to look for the whole takes time with the text's length."""


class PartTokenizer:
    """As much of ``tokenizers.Tokenizer`` as :class:`fewbit.model.tokenizer.FileTokenizer` uses.

    The first text is read with the part of the vocabulary that it can use, for which the file is passed through again;
    for the second one the package reads all of it. Text of tokens is made without: it takes their names.
    """

    def __init__(self, passed: Passed) -> None:
        """Raises ValueError: the package cannot read what ``passed`` has."""
        from tokenizers import Tokenizer

        self._passed, self._used = passed, False
        model = passed.rest["model"] | {"vocab": passed.added}
        try:
            self.rest: Any = Tokenizer.from_str(json.dumps(passed.rest | {"model": model}))
            """All but the vocabulary; what is changed in it holds for every text."""
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise ValueError(f"reading {passed.file}: {error}") from error
        self._names = {number: content for content, number in passed.added.items()}
        self._special = {token.content for token in self.rest.get_added_tokens_decoder().values() if token.special}

    def no_truncation(self) -> None:
        self.rest.no_truncation()

    def no_padding(self) -> None:
        self.rest.no_padding()

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        own = len(self._passed)
        return own + sum(number >= own for number in self._names) if with_added_tokens else own

    def token_to_id(self, name: str) -> int | None:
        """Of added tokens."""
        return self._passed.added.get(name)

    def id_to_token(self, token: int) -> str | None:
        found = self._names.get(token)
        return self._passed.name(token).decode() if found is None and token < len(self._passed) else found

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        names = [name for token in tokens if (name := self.id_to_token(token)) is not None]
        if skip_special_tokens:
            names = [name for name in names if name not in self._special]
        decoder = self.rest.decoder
        return " ".join(names) if decoder is None else str(decoder.decode(names))

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        """A ``tokenizers.Encoding``.

        Raises:
            InputError: the file is damaged.
        """
        first, self._used = not self._used, True
        part = self._part(text) if first else None
        if part is None:
            return self._whole.encode(text, add_special_tokens=add_special_tokens)
        model, self.rest.model = self.rest.model, part
        found = self.rest.encode(text, add_special_tokens=add_special_tokens)
        self.rest.model = model
        return found

    @cached_property
    def _whole(self) -> Any:
        whole = read_whole(self._passed.file)
        if whole is None:
            raise InputError(f"reading {self._passed.file}", "it describes no tokenizer", "the original's file, whole")
        whole.pre_tokenizer = self.rest.pre_tokenizer
        whole.no_truncation()
        whole.no_padding()
        return whole

    def _part(self, text: str) -> Any:
        """The model of all that ``text`` can use; None where the package is to judge the file."""
        from tokenizers.models import BPE

        told, pieces = self._passed.rest["model"], self._pieces(text)
        used = self._used_by(pieces)
        lost = "".join({character: "" for piece in pieces for character in piece if character not in used})
        if lost:  # the package may join what is beside those, or one token for them with it
            some = re.compile(f"[{re.escape(lost)}]{'+' if told.get('fuse_unk') else ''}")
            used = self._used_by([*pieces, *(some.sub(lambda _: told.get("unk_token") or "", one) for one in pieces)])
        names = ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
        settings = {name: told[name] for name in names if told.get(name) is not None}
        try:
            return BPE(vocab=used, merges=self._passed.merges(used), **settings)
        except (OSError, ValueError, TypeError):
            return None

    def _pieces(self, text: str) -> list[str]:
        """What the model would be given of ``text``."""
        from tokenizers import pre_tokenizers

        own, listener = self.rest.pre_tokenizer, _Listener()
        listening = pre_tokenizers.PreTokenizer.custom(listener)
        self.rest.pre_tokenizer = listening if own is None else pre_tokenizers.Sequence([own, listening])
        self.rest.encode(text, add_special_tokens=False)
        self.rest.pre_tokenizer = own
        return list(listener.pieces)

    def _used_by(self, pieces: list[str]) -> dict[str, int]:
        """Tokens that may be parts of ``pieces``, are for bytes, or for what is unknown, with their numbers."""
        text = APART.join(piece.encode() for piece in pieces)
        grams = {text[at : at + size] for size in range(1, GRAM + 1) for at in range(len(text))}
        unknown = (self._passed.rest["model"].get("unk_token") or "").encode()
        found: dict[str, int] = {}
        names, begin = self._passed.names, 0
        for token, end in enumerate(self._passed.ends):
            name, begin = names[begin:end], end
            if (name[:GRAM] in grams and name[-GRAM:] in grams) or name.startswith(BYTE) or name == unknown:
                found[name.decode()] = token
        return found


def open_part(file: Path) -> PartTokenizer | None:
    """The tokenizer that ``file`` describes; None where the package is to read all of it."""
    passed = pass_through(file)
    try:
        return None if passed is None else PartTokenizer(passed)
    except ValueError:
        return None


class _Listener:
    """A pre-tokenizer that changes nothing and keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: dict[str, None] = {}

    def pre_tokenize(self, text: Any) -> None:
        text.split(self._hear)

    def _hear(self, _: int, piece: Any) -> list[Any]:
        self.pieces[str(piece)] = None
        return [piece]
