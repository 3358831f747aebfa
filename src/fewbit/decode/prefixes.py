# SPDX-License-Identifier: Apache-2.0
"""Caches of finished texts, kept for prompts that begin alike, as the turns of a conversation do."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence

from fewbit.decode.engine import Engine
from fewbit.errors import FewbitError

REUSE = 16
"""Shared positions from which on a cache is taken over; computing fewer is as fast."""

Running = Sequence[tuple[int, Sequence[int]]]
"""Sequences that are being written and the tokens that the engine has seen of each."""


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common.

    >>> shared([1, 2, 3], (1, 2, 4, 5)), shared([], [1]), shared([1, 2], [1, 2, 3])
    (2, 0, 2)
    """
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving compares slices, which is far faster than a loop over tokens
        middle = (low + high + 1) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


class Prefixes:
    """The sequences of an engine that nobody writes, least recently used first; ``most`` are open with the others."""

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most
        self._idle: OrderedDict[int, list[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._idle)

    def keep(self, sequence: int, tokens: list[int]) -> None:
        """Nobody writes ``sequence`` any more; the engine has seen ``tokens`` of it."""
        if len(tokens) < REUSE:
            self.drop(sequence)
        else:
            self._idle[sequence] = tokens

    def drop(self, sequence: int) -> None:
        """Close ``sequence``, whatever state it is in."""
        self._idle.pop(sequence, None)
        with contextlib.suppress(FewbitError):  # a failed pass may have closed it
            self._engine.close(sequence)

    def clear(self) -> None:
        for sequence in list(self._idle):
            self.drop(sequence)

    def longest(self, prompt: Sequence[int], running: Running) -> int:
        """Positions of ``prompt`` that some sequence holds; its last token must be fed, for the logits after it."""
        return self._longest(prompt, running)[0]

    def begin(self, prompt: Sequence[int], running: Running) -> tuple[int, int]:
        """A sequence for ``prompt``, and how many of its first positions it holds already.

        Raises:
            UnsupportedError: the engine has fewer sequences than it was asked for.
        """
        length, source = self._longest(prompt, running)
        if length >= REUSE:
            with contextlib.suppress(FewbitError):  # an engine may be unable to forget: all is computed anew
                return self._continue(source, length, len(running)), length
        self._make_room(len(running))
        return self._engine.open(), 0

    def _longest(self, prompt: Sequence[int], running: Running) -> tuple[int, int]:
        held = [*running, *self._idle.items()]
        found = max(((shared(prompt, tokens), sequence) for sequence, tokens in held), default=(0, -1))
        return min(found[0], len(prompt) - 1), found[1]

    def _continue(self, source: int, length: int, running: int) -> int:
        """The first ``length`` positions of ``source``: itself where it is idle and nothing is lost by that, or nothing
        else can give way; else a copy."""
        others = [sequence for sequence in self._idle if sequence != source]
        full = running + len(self._idle) >= self._most
        if source in self._idle and (len(self._idle[source]) == length or (full and not others)):
            del self._idle[source]
            try:
                self._engine.keep(source, length)
            except FewbitError:
                self.drop(source)
                raise
            return source
        if full and others:
            self.drop(others[0])
        if source in self._idle:
            self._idle.move_to_end(source)
        return self._engine.fork(source, length)

    def _make_room(self, running: int) -> None:
        while self._idle and running + len(self._idle) >= self._most:
            self.drop(next(iter(self._idle)))
