# SPDX-License-Identifier: Apache-2.0
"""Between tokens and what a person reads: text that comes token by token, stop strings, ends, chat templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fewbit.containers.files import read_json
from fewbit.decode.kept_tokenizer import keep, open_kept
from fewbit.decode.templates import Templates
from fewbit.errors import InputError
from fewbit.memory import give_back
from fewbit.model.tokenizer import FileTokenizer, of_transformers, open_tokenizer

REPLACEMENT = "�"
"""What decoders write for bytes that are no character, or not yet."""
PENDING = 16
"""Tokens held back at most; four bytes, each a token of its own, are the longest character."""


class TextStream:
    """Text of tokens as they come; never half a character.

    A token's text depends on those before it (a space that only the first one lacks, a character that several tokens
    share), so a few are decoded again with each new one, and what is longer than before is the news.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """``decode``: tokens to text, special ones left out. ``before``: the prompt, whose end is the first context."""
        self._decode = decode
        self._tokens = list(before[-PENDING:])
        self._begin, self._shown = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """The text that became certain by ``token``; often empty."""
        self._tokens.append(token)
        text = self._news()
        if not text or (text.endswith(REPLACEMENT) and len(self._tokens) - self._shown < PENDING):
            return ""
        self._begin, self._shown = self._shown, len(self._tokens)
        return text

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        text = self._news()
        self._begin = self._shown = len(self._tokens)
        return text

    def _news(self) -> str:
        if self._begin > 4 * PENDING:  # what is no longer decoded need not be kept
            del self._tokens[: self._begin]
            self._begin, self._shown = 0, self._shown - self._begin
        shown = self._decode(self._tokens[self._begin : self._shown])
        return self._decode(self._tokens[self._begin :])[len(shown) :]


class StopStrings:
    """Ends a text before the first of ``stops``, and holds back what could become one.

    >>> stops = StopStrings(["\\n\\n", "END"])
    >>> stops.push("a\\nE"), stops.push("N"), stops.push("d\\n"), stops.push("\\nb"), stops.stopped
    ('a\\n', '', 'ENd', '', True)
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What of the text so far can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return "" if self.stopped else held


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that ``stop`` begins with, the whole of it excepted."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Words:
    """A tokenizer, of transformers or a :class:`fewbit.model.tokenizer.FileTokenizer`, the tokens at which its model
    ends, and its chat template."""

    def __init__(self, tokenizer: Any, ends: Iterable[int] = (), templates: Templates | None = None) -> None:
        self.tokenizer, self._templates = tokenizer, templates or Templates()
        own = tokenizer.eos_token_id
        self.ends = frozenset(ends) | (frozenset() if own is None else {int(own)})
        if not isinstance(tokenizer, FileTokenizer):
            self.encode("a")  # switches off truncation that a file may ask for: later, threads only read the tokenizer

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer begins every text with.

        Raises:
            InputError: half a surrogate pair, which is no text.
        """
        return [int(token) for token in self.tokenizer(_sound(text), verbose=False)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; special tokens are left out, and so are numbers that the tokenizer has no text for."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def _before(self) -> list[int]:
        return [int(token) for token in self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]]

    def bytes_of(self, token: int) -> bytes:
        """What one token, special or not, adds to a text that it does not begin: UTF-8, or a part of a character."""

        def text(tokens: Sequence[int]) -> str:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

        added = text([*self._before, token])[len(text(self._before)) :]
        name = self.tokenizer.convert_ids_to_tokens(token) if REPLACEMENT in added else None
        return added.encode() if name is None else _bytes_named(name)

    def piece(self, token: int) -> str:
        """One token by itself, for lists of alternatives; a part of a character as OpenAI writes it,
        ``bytes:\\xf0\\x9f``."""
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return TextStream(self.decode, before)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant begins to answer.

        The template is a program from the model's folder: see :mod:`fewbit.decode.templates`.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.

        Raises:
            InputError: the folder has no template, or the template refuses the messages or takes too long.
        """
        found = self.tokenizer.chat_template
        template = found.get("default") if isinstance(found, dict) else found
        if not template:
            found = "the model's folder holds none: it was not trained to converse"
            raise InputError("a chat template", found, "plain completions would work, or a model made for chat")
        for message in messages:
            _sound(message["content"])
        values = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        text = self._templates.render(
            template, {**self.tokenizer.special_tokens_map, **values, "add_generation_prompt": True}
        )
        return [int(t) for t in self.tokenizer(_sound(text), add_special_tokens=False, verbose=False)["input_ids"]]

    def close(self) -> None:
        """End the process that renders templates."""
        self._templates.close()


def _bytes_named(name: str) -> bytes:
    """The bytes of a token of a vocabulary whose rare characters are tokens such as ``<0xF0>``, or one that writes
    each byte as a character."""
    if len(name) == 6 and name.startswith("<0x"):
        return bytes([int(name[3:5], 16)])
    known = all(character in ALPHABET for character in name)
    return bytes(ALPHABET[character] for character in name) if known else name.encode()


def _alphabet() -> dict[str, int]:
    """Characters for bytes (Radford et al. 2019): those that print are themselves, others are counted from 256."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = _alphabet()
"""Of byte-level vocabularies."""


def words_of(folder: Path, once: bool = False) -> Words:
    """The tokenizer in ``folder``, ends by ``generation_config.json`` and ``config.json``. ``once``: for one prompt, as
    :func:`fewbit.model.tokenizer.open_tokenizer` has it.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    own = open_kept(folder, once) or open_tokenizer(folder, once)
    if own is not None:
        give_back(0)  # reading a tokenizer leaves several times the size of its file
        return Words(own, ends_of(folder))
    tokenizer = of_transformers(folder)
    words = Words(tokenizer, ends_of(folder))
    keep(folder, tokenizer)
    return words


def ends_of(folder: Path) -> frozenset[int]:
    """The tokens that end a text: ``eos_token_id``, one or several, of both configs.

    Raises:
        InputError: a config is no JSON object.
    """
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        whole = read_json(path) if path.is_file() else {}
        part = whole.get("text_config")  # of a vision-language model
        for config in (whole, part if isinstance(part, dict) else {}):
            found = config.get("eos_token_id")
            listed = found if isinstance(found, list) else [found]
            ends |= {token for token in listed if isinstance(token, int) and not isinstance(token, bool)}
    return frozenset(ends)


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the text", f"half a surrogate pair at character {error.start}", "valid Unicode") from error
    return text
