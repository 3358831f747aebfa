# SPDX-License-Identifier: Apache-2.0
"""``tokenizer.json``: read whole by the package tokenizers, or passed through a window at a time.

The package holds about 310 bytes a token of byte-pair encoding, and for a moment, while it reads, half as much again;
Gemma 3 takes 200 MiB and 4 s so. What one text needs of it is little: see :mod:`fewbit.model.part_tokenizer`.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

WINDOW = 1 << 17
"""Bytes of the file that are held at a time."""
LARGEST_HEAD = 4 << 20
"""Bytes before the vocabulary, which is normalization and added tokens: 1.1 MB of Gemma 3, the most of those known."""
_BEGIN = re.compile(rb'"merges"\s*:\s*\[\s*(?=\[)')
_PAIR = re.compile(rb'\[\s*"((?:[^"\\]|\\.)*)"\s*,\s*"((?:[^"\\]|\\.)*)"\s*\]\s*(,?)\s*')
_CLOSING = re.compile(rb'"\s*\]\s*\]')
_VOCABULARY = re.compile(rb'"vocab"\s*:\s*\{')
_MERGES = re.compile(rb'\}\s*,\s*"merges"\s*:\s*\[')
_WITHIN_LINES = bytes(set(range(256)) - set(b"\0\1\n"))
_END = re.compile(rb"\]\s*\}\s*\}\s*\Z")


def read_whole(file: Path) -> Any:
    """The tokenizer of the package tokenizers that ``file`` describes; None where that cannot read it."""
    from tokenizers import Tokenizer

    found = file.read_bytes()
    for text in (lean(found), found):
        try:
            return Tokenizer.from_buffer(text)
        except Exception:
            continue
    return None


def lean(text: bytes) -> bytes:
    """``tokenizer.json`` with each merge as one string and not as a list of two, where all can be: as it was written
    before, in which the package tokenizers takes half of the memory to read it. The tokenizer is the same.

    >>> lean(b'{"vocab": {"a": 0}, "merges": [["a", "b"], ["ab", "c"]]}')
    b'{"vocab": {"a": 0}, "merges": ["a b","ab c"]}'
    """
    found = _BEGIN.search(text)
    if found is None:
        return text
    merges, end, count = _on_lines(text, found.end()) or _pair_by_pair(text, found.end())
    # A comment, and a token with a space in it, which may be an escape: those cannot be told from another merge.
    if text[end : end + 1] != b"]" or merges.count(b" ") != count or b'"#version' in merges or b"\\u0020" in merges:
        return text
    return b"".join((text[: found.end()], merges, text[end:]))


def _on_lines(text: bytes, at: int) -> tuple[bytes, int, int] | None:
    """The pairs from ``at`` on as strings, where they end, and how many they are; None where they do not lie on lines
    of their own, all in one way, as the package writes them: no string holds a line's end, so that what is between two
    tokens is found, and nothing like it in a token."""
    first = _PAIR.match(text, at)
    second = _PAIR.match(text, first.end()) if first else None
    if not first or not second:
        return None
    within, between = text[first.end(1) : first.start(2)], text[first.end(2) : second.start(1)]
    last = text.rfind(between[: between.index(b"]") + 1])
    closing = _CLOSING.match(text, last)
    if closing is None:
        return None
    tokens = text[first.start(1) : last].replace(within, b"\0").replace(between, b"\1")
    ends = tokens.translate(None, _WITHIN_LINES)
    if b"\n" not in within or b"\n" not in between or ends != b"\0\1" * (len(ends) // 2) + b"\0":
        return None
    merges = tokens.replace(b"\0", b" ").replace(b"\1", b'","')
    return b'"%b"' % merges, closing.end() - 1, len(ends) // 2 + 1


def _pair_by_pair(text: bytes, at: int) -> tuple[bytes, int, int]:
    """As :func:`_on_lines`, up to what is no pair, however they lie."""
    merges, count = bytearray(), 0
    while pair := _PAIR.match(text, at):
        merges += b'"%b %b"%b' % pair.groups()
        at, count = pair.end(), count + 1
    return bytes(merges), at, count


@dataclass(frozen=True)
class Passed:
    """A byte-pair encoding as :func:`pass_through` finds it. ``rest``: the whole file but for vocabulary and merges,
    which are empty there. Token ``n`` is ``names[ends[n - 1]:ends[n]]``, UTF-8. ``added``: the number of each token
    that ``rest`` adds, and of that for what is unknown. Merges begin at ``at`` in ``file``."""

    file: Path
    rest: dict[str, Any]
    names: bytes = field(repr=False)
    ends: array[int] = field(repr=False)
    added: dict[str, int]
    at: int

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, token: int) -> bytes:
        return self.names[self.ends[token - 1] if token else 0 : self.ends[token]]

    def merges(self, among: Container[str]) -> list[tuple[str, str]]:
        """Those of tokens ``among`` into one of them, first ones first.

        Raises:
            ValueError: there is something else between merges.
        """
        found: list[tuple[str, str]] = []
        with self.file.open("rb") as file:
            file.seek(self.at)
            window = _Window(file)
            pairs = b"[" in window.peek(64)
            for part in window.members(b"[%b]", _END, b"]," if pairs else b'",'):
                # A comment, and a token with a space in it, are the package's to judge.
                each = part if pairs else [merge.split(" ") for merge in part]
                found += [(a, b) for a, b in each if a in among and b in among and a + b in among]
        return found


class _Window:
    """A file in parts: JSON that is never held whole. A cut within a string leaves it open, which the parser refuses;
    then an earlier one is tried."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._held = file, b""

    def peek(self, size: int) -> bytes:
        self._more(size)
        return self._held[:size]

    def _more(self, size: int = WINDOW) -> bool:
        read = self._file.read(size)
        self._held += read
        return bool(read)

    def until(self, mark: re.Pattern[bytes], most: int) -> bytes:
        """What there is before the end of ``mark``. Raises ValueError: that is more than ``most``."""
        while not (found := mark.search(self._held)):
            if len(self._held) > most or not self._more():
                raise ValueError(f"no {mark.pattern!r}")
        before, self._held = self._held[: found.end()], self._held[found.end() :]
        return before

    def members(self, within: bytes, end: re.Pattern[bytes], between: bytes) -> Iterator[Any]:
        """Members of a list or an object up to ``end``, several at a time, as JSON that ``within`` makes of them.
        ``between`` ends in the comma that follows each but the last."""
        found = None
        while found is None:
            more = self._more()
            found = end.search(self._held) if not more or end is not _END else None
            if found is None:
                if not more or len(self._held) > LARGEST_HEAD:
                    raise ValueError(f"no {end.pattern!r}")
                yield from self._cut(within, between)
        yield json.loads(within % self._held[: found.start()])
        self._held = self._held[found.end() :]

    def _cut(self, within: bytes, between: bytes) -> Iterator[Any]:
        at = len(self._held)
        while (at := self._held.rfind(between, 0, at)) >= 0:
            comma = at + len(between) - 1
            try:
                part = json.loads(within % self._held[:comma])
            except ValueError:
                continue
            self._held = self._held[comma + 1 :]
            yield part
            return

    def place(self) -> int:
        """Where in the file what is held begins."""
        return self._file.tell() - len(self._held)


def pass_through(file: Path) -> Passed | None:
    """What ``file`` describes, where it is a byte-pair encoding as the package writes one: tokens from 0 on in order,
    merges last, nothing random, no mark on parts of words. None: another, or none."""
    try:
        with file.open("rb") as opened:
            return _passed(file, opened)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _passed(file: Path, opened: BinaryIO) -> Passed:
    window = _Window(opened)
    rest = json.loads(window.until(_VOCABULARY, LARGEST_HEAD) + b'},"merges":[]}}')
    model = rest["model"]
    if (model["type"], model["vocab"], model.get("dropout")) != ("BPE", {}, None):
        raise ValueError("another model")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("marks on parts of words")
    contents = [token["content"] for token in rest["added_tokens"]]
    unknown = model.get("unk_token")
    wanted, known = {*contents, unknown}, {}
    names, ends = bytearray(), array("I")
    for part in window.members(b"{%b}", _MERGES, b","):
        if list(part.values()) != list(range(len(ends), len(ends) + len(part))):
            raise ValueError("tokens out of order")
        known.update({name: part[name] for name in wanted & part.keys()})
        for name in part:
            names += name.encode()
            ends.append(len(names))
    lacking = dict.fromkeys(content for content in contents if content not in known)
    known.update(zip(lacking, range(len(ends), len(ends) + len(lacking)), strict=True))  # the package counts on
    if any(known[token["content"]] != token["id"] for token in rest["added_tokens"]) or "" in wanted:
        raise ValueError("added tokens by other numbers")
    if unknown is not None and unknown not in known:
        raise ValueError("no token for what is unknown")
    at = window.place()
    opened.seek(max(opened.seek(0, 2) - 64, 0))
    if not _END.search(opened.read()):
        raise ValueError("merges are not last")
    return Passed(file, rest, bytes(names), ends, known, at)
