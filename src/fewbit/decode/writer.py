# SPDX-License-Identifier: Apache-2.0
"""``fewbit.generate``: one text at a time from a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fewbit.core import given
from fewbit.decode.batch import Batcher, Limits
from fewbit.decode.engine import Engine, open_engine
from fewbit.decode.job import Piece
from fewbit.decode.sampling import Sampling
from fewbit.decode.text import words_of

Prompt = str | Sequence[Mapping[str, str]]
"""A text to continue, or a conversation to answer: ``{"role": ..., "content": ...}`` each."""
MOST = 64
"""Tokens that are added where nobody says how many."""


class Writer:
    """Writes texts with the model of a folder, one after another. A context manager; closing it frees the caches.

    Args:
        folder, activation, kv, context, threads: as :func:`fewbit.decode.open_engine` takes them.

    Raises:
        InputError: no model or no tokenizer is there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        activation: str | None = None,
        kv: str = "float16",
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.words = words_of(given.place("the model", folder), once=True)
        self.engine: Engine = open_engine(
            folder, activation=activation, kv=kv, sequences=1, context=context, threads=threads
        )
        self._batcher = Batcher(self.engine, self.words, Limits(running=1, waiting=1, kept=0))

    def pieces(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """The text after ``prompt`` as it comes; the last piece says why it ended.

        Raises:
            InputError: the prompt holds no token, or more than the context; there is no chat template.
            SpecError: ``sampling`` asks for more tokens than the context has room for, or an argument is of another
                kind.
        """
        given.kind("sampling", sampling, Sampling, "fewbit.Sampling(temperature=0.7), say")
        _check(prompt)
        tokens = self.words.encode(prompt) if isinstance(prompt, str) else self.words.chat(prompt)
        return self._batcher.stream(tokens, sampling)

    def close(self) -> None:
        self.words.close()
        self._batcher.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(prompt: Any) -> None:
    works = "a text, or messages such as {'role': 'user', 'content': 'Hello'} in a list"
    given.kind("the prompt", prompt, (str, list, tuple), works)
    for message in () if isinstance(prompt, str) else prompt:
        given.kind("a message of the prompt", message, Mapping, works)
        for name in ("role", "content"):
            given.kind(f"{name!r} of a message", message.get(name), str, works)


def generate(
    folder: str | Path,
    prompt: Prompt,
    sampling: Sampling | None = None,
    *,
    activation: str | None = None,
    kv: str = "float16",
    threads: int | None = None,
) -> str:
    """What the model in ``folder`` writes after ``prompt``, without the prompt; greedy, 64 tokens, by default.

    Args:
        prompt: a text to continue, or messages to answer by the folder's chat template.
        sampling: how to choose tokens, and when to stop.
        activation: round the inputs of linear layers to this format, e.g. ``"int8/channel"``, and multiply integers.
        kv: what keys and values are kept in: float16, bfloat16, float32, int8 or int4.
        threads: None: all cores of this process.

    Raises:
        InputError: no model, no tokenizer, a prompt that is empty or too long, or no chat template.
        SpecError: an argument is of another kind, or ``activation`` or ``kv`` spells nothing.
    """
    with Writer(folder, activation=activation, kv=kv, threads=threads) as writer:
        chosen = sampling or Sampling(temperature=0.0, max_tokens=MOST)
        return "".join(piece.text for piece in writer.pieces(prompt, chosen))
