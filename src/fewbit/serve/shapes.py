# SPDX-License-Identifier: Apache-2.0
"""The objects that OpenAI's clients read: completions, chat completions, and the chunks of both."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbit.decode.sampling import Logprobs
from fewbit.decode.text import Words

LEAST_LOG = -9999.0
"""Stands for the logarithm of zero, which JSON cannot write."""

Tokens = tuple[tuple[int, Logprobs | None], ...]


@dataclass(frozen=True)
class Shape:
    """The objects of one answer. ``chat``: a message, else plain text."""

    chat: bool
    model: str
    words: Words
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, **usage}

    def choice(self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def delta(self, index: int, text: str, finish: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        content = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, tokens: Tokens, offset: int = 0) -> dict[str, Any] | None:
        """What is known of ``tokens``; None where nothing was asked. ``offset``: characters of the text before them."""
        known = [(token, logs) for token, logs in tokens if logs is not None]
        if not known:
            return None
        return {"content": [self._entry(*pair) for pair in known]} if self.chat else self._table(known, offset)

    def length(self, tokens: Tokens) -> int:
        """Characters of what something is known of, whether it is shown already or held back."""
        return sum(_characters(self.words.bytes_of(token)) for token, logs in tokens if logs is not None)

    def echo(self, prompt: Sequence[int], scores: Sequence[Logprobs], text: str) -> dict[str, Any]:
        """What is known of the tokens of ``prompt``, which reads ``text``: nothing of the first."""
        begun = [_characters(self.words.bytes_of(token)) for token in prompt]
        unseen = max(sum(begun) - len(text), 0)  # of a token that begins every text, and a space before the first word
        ends = itertools.accumulate(begun, initial=0)
        found = self._table(list(zip(prompt[1:], scores, strict=True)), 0)
        return {
            "tokens": [self.words.piece(prompt[0]), *found["tokens"]],
            "token_logprobs": [None, *found["token_logprobs"]],
            "top_logprobs": [None, *found["top_logprobs"]],
            "text_offset": [max(end - unseen, 0) for end, _ in zip(ends, prompt)],  # noqa: B905 - one more
        }

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _entry(self, token: int, logs: Logprobs) -> dict[str, Any]:
        return {**self._token(token, logs.taken), "top_logprobs": [self._token(*pair) for pair in logs.top]}

    def _token(self, token: int, log: float) -> dict[str, Any]:
        return {
            "token": self.words.piece(token),
            "logprob": max(log, LEAST_LOG),
            "bytes": list(self.words.bytes_of(token)),
        }

    def _table(self, known: list[tuple[int, Logprobs]], offset: int) -> dict[str, Any]:
        begun = [_characters(self.words.bytes_of(token)) for token, _ in known]
        return {
            "tokens": [self.words.piece(token) for token, _ in known],
            "token_logprobs": [max(logs.taken, LEAST_LOG) for _, logs in known],
            "top_logprobs": [{self.words.piece(t): max(log, LEAST_LOG) for t, log in logs.top} for _, logs in known],
            "text_offset": [offset + sum(begun[:index]) for index in range(len(known))],
        }


def joined(first: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is known of two texts, one after the other."""
    return first or then if first is None or then is None else {name: first[name] + then[name] for name in first}


def _characters(piece: bytes) -> int:
    """How many characters of UTF-8 begin in ``piece``."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)
