# SPDX-License-Identifier: Apache-2.0
"""An engine whose logits are a hash of the sequence: a token that went astray changes all that follow."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.decode.ledger import Ledger
from fewbit.errors import InputError, UnsupportedError


def hashed(tokens: Sequence[int]) -> int:
    state = 0
    for token in tokens:
        state = (state * 6364136223846793005 + token + 1442695040888963407) & ((1 << 64) - 1)
    return state >> 20


class FakeEngine:
    """``poison``: a token that makes the pass fail which is fed it, half done. ``hollow``: one after which logits are
    NaN. ``forgets``: whether keep and fork work. ``parts``: the tokens of each pass that ended, by sequence."""

    name, why = "fake", None

    def __init__(
        self,
        vocab_size: int = 258,
        context: int = 512,
        sequences: int = 12,
        seconds: float = 0.0,
        poison: int = -1,
        hollow: int = -1,
        forgets: bool = True,
        never: Sequence[int] = (0, 1),
    ) -> None:
        self.vocab_size, self.context, self.seconds = vocab_size, context, seconds
        self.poison, self.hollow, self.forgets, self.never = poison, hollow, forgets, list(never)
        self.words = sorted(set(range(vocab_size)) - set(never))
        self.held: dict[int, list[int]] = {}
        self.parts: list[dict[int, list[int]]] = []
        self._rows = torch.empty(sequences, vocab_size)
        self._ledger = Ledger(vocab_size, context, sequences)

    def open(self) -> int:
        sequence = self._ledger.open()
        self.held[sequence] = []
        return sequence

    def feed(self, parts: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        self._ledger.check_feed(parts)
        if self.seconds:
            time.sleep(self.seconds)
        for sequence, tokens in parts:
            if self.poison in tokens:
                raise RuntimeError("poisoned")
            self.held[sequence].extend(tokens)
            self._ledger.feed([(sequence, tokens)])
        self.parts.append({sequence: list(tokens) for sequence, tokens in parts})
        return torch.stack([self.logits(self.held[sequence]) for sequence, _ in parts])

    def feed_rows(self, parts: Sequence[tuple[int, Sequence[int]]]) -> list[memoryview]:
        """Rows that the next call overwrites, as the native runtime's."""
        fed = self.feed(parts)
        self._rows[: len(fed)] = fed
        return [memoryview(row) for row in self._rows[: len(fed)].numpy()]

    def feed_every(self, sequence: int, tokens: Sequence[int]) -> list[memoryview]:
        return [memoryview(self.feed([(sequence, [token])])[0].numpy()) for token in tokens]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """(vocab): one likely token, three that follow it; those of ``never`` do not come."""
        if tokens[-1] == self.hollow:
            return torch.full((self.vocab_size,), torch.nan)
        row = torch.zeros(self.vocab_size)
        for rank in range(4):
            row[self.words[hashed([*tokens, rank]) % len(self.words)]] = 12.0 - rank
        row[self.never] = -torch.inf
        return row

    def after(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` likeliest tokens after ``prompt``, one by one."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(prompt) :]

    def length(self, sequence: int) -> int:
        return self._ledger.length(sequence)

    def keep(self, sequence: int, length: int) -> None:
        if not self.forgets and length < self.length(sequence):
            raise InputError("forgetting", "this engine cannot")
        self._ledger.keep(sequence, length)
        del self.held[sequence][length:]

    def fork(self, sequence: int, length: int) -> int:
        if not self.forgets:
            raise UnsupportedError("forgetting", "this engine cannot")
        self._ledger.check_keep(sequence, length)
        new = self._ledger.open(length)
        self.held[new] = self.held[sequence][:length]
        return new

    def close(self, sequence: int) -> None:
        self._ledger.close(sequence)
        del self.held[sequence]

    def nbytes(self) -> int:
        return 8 * sum(map(len, self.held.values()))
