# SPDX-License-Identifier: Apache-2.0
"""Which sequences are open and how long they are: every engine refuses the same things, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

from fewbit.errors import InputError, UnsupportedError

Parts = Sequence[tuple[int, Sequence[int]]]


class Ledger:
    """Lengths of at most ``most`` open sequences of at most ``context`` positions, by number."""

    def __init__(self, vocab_size: int, context: int, most: int) -> None:
        self.vocab_size, self.context, self.most = vocab_size, context, most
        self._lengths: dict[int, int] = {}

    def open(self, length: int = 0) -> int:
        """The lowest number that is free, for a sequence of ``length`` positions.

        Raises:
            UnsupportedError: there are ``most`` already.
        """
        if len(self._lengths) >= self.most:
            raise UnsupportedError("one more sequence", f"{self.most} are open", "close one, or ask for more at first")
        sequence = next(number for number in range(self.most) if number not in self._lengths)
        self._lengths[sequence] = length
        return sequence

    def close(self, sequence: int) -> None:
        self.length(sequence)
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        """Positions of ``sequence``.

        Raises:
            InputError: it is not open.
        """
        if sequence not in self._lengths:
            raise InputError(f"sequence {sequence}", "it is not open", "one that open() or fork() gave")
        return self._lengths[sequence]

    def check_keep(self, sequence: int, length: int) -> None:
        """Raises InputError unless ``sequence`` has ``length`` positions."""
        if not 0 <= length <= self.length(sequence):
            raise InputError(f"the first {length} positions of sequence {sequence}", f"it has {self.length(sequence)}")

    def keep(self, sequence: int, length: int) -> None:
        self.check_keep(sequence, length)
        self._lengths[sequence] = length

    def check_feed(self, parts: Parts) -> None:
        """Raises InputError for what :meth:`fewbit.decode.Engine.feed` refuses."""
        for sequence, tokens in parts:
            after = self.length(sequence) + len(tokens)
            if not len(tokens):
                raise InputError(f"feeding sequence {sequence}", "no tokens", "one at least")
            if after > self.context:
                found = f"its {self.length(sequence)} and {len(tokens)} more exceed the context"
                raise InputError(f"feeding sequence {sequence}", found, f"at most {self.context} positions")
            wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if wrong is not None:
                raise InputError(f"feeding sequence {sequence}", f"token {wrong}", f"ids below {self.vocab_size}")
        if len({sequence for sequence, _ in parts}) < len(parts):
            raise InputError("feeding sequences", "one comes twice", "each once a call")

    def feed(self, parts: Parts) -> None:
        for sequence, tokens in parts:
            self._lengths[sequence] += len(tokens)
