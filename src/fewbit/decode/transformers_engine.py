# SPDX-License-Identifier: Apache-2.0
"""Any causal language model of transformers as an engine: the fallback, and what the native runtime is tested against.

A sequence is its tokens and a transformers cache of the first of them. What a cache cannot do (forget positions that
left a sliding window, or a recurrent state) is done by computing it anew from the tokens.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import kernels
from fewbit.containers import manifest as M
from fewbit.decode.ledger import Ledger, Parts

CHUNK = 512
"""Tokens of a forward pass at most: attention takes memory for each pair of new and old positions."""


@dataclass
class _Sequence:
    """``cache`` holds the first ``cached`` of ``tokens``; None holds none."""

    tokens: list[int] = field(default_factory=list)
    cache: Any = None
    cached: int = 0


class TransformersEngine:
    """See :class:`fewbit.decode.Engine`. Parts of one call run one after the other."""

    name = "transformers"

    def __init__(self, model: Any, why: str | None, sequences: int = 8, context: int | None = None) -> None:
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        self.why, self.model, self._config = why, model, config
        self.vocab_size = int(model.get_output_embeddings().out_features)
        self.context = min(value for value in (limit, context, 1 << 30) if value is not None)
        self._ledger = Ledger(self.vocab_size, self.context, sequences)
        self._sequences: dict[int, _Sequence] = {}
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @staticmethod
    def load(
        folder: Path, why: str | None, activation: str | None, sequences: int, context: int | None, threads: int | None
    ) -> TransformersEngine:
        """The model in ``folder``; arguments as of :func:`fewbit.decode.open_engine`."""
        from fewbit.integrations.load import load
        from fewbit.model.classes import from_folder

        if threads is not None:
            torch.set_num_threads(threads)
            kernels.set_threads(threads)
        if (folder / M.NAME).is_file():
            model = load(folder, activation=activation)
        else:
            model = from_folder(folder)
        return TransformersEngine(model, why, sequences, context)

    def open(self) -> int:
        sequence = self._ledger.open()
        self._sequences[sequence] = _Sequence()
        return sequence

    def feed(self, parts: Parts) -> Tensor:
        self._ledger.check_feed(parts)
        logits = torch.empty(len(parts), self.vocab_size, dtype=torch.float32)
        for row, (sequence, tokens) in enumerate(parts):
            held = self._sequences[sequence]
            held.tokens.extend(int(token) for token in tokens)
            logits[row] = self._advance(held)
        self._ledger.feed(parts)
        return logits

    def feed_rows(self, parts: Parts) -> list[memoryview[float]]:
        return [row.data for row in self.feed(parts).numpy()]

    def feed_every(self, sequence: int, tokens: Sequence[int]) -> list[memoryview[float]]:
        rows = []
        for token in tokens:  # one by one: a cache that forgot may have more than these to compute
            rows += self.feed_rows([(sequence, [token])])
        return rows

    def _advance(self, held: _Sequence) -> Tensor:
        """Compute what ``held`` has not cached yet; the logits (vocab_size,) after its last token."""
        from transformers import DynamicCache

        if held.cache is None:
            held.cache, held.cached = DynamicCache(config=self._config), 0
        logits = torch.empty(0)
        with torch.inference_mode():
            while held.cached < len(held.tokens):
                ids = torch.tensor([held.tokens[held.cached : held.cached + CHUNK]])
                output = self.model(input_ids=ids, past_key_values=held.cache, use_cache=True, **self._last_only)
                held.cached += ids.shape[1]
                logits = output.logits[0, -1].float()
        return logits

    def length(self, sequence: int) -> int:
        return self._ledger.length(sequence)

    def keep(self, sequence: int, length: int) -> None:
        self._ledger.keep(sequence, length)
        held = self._sequences[sequence]
        del held.tokens[length:]
        if held.cached <= length:
            return
        if length and _can_forget(held.cache):
            held.cache.crop(length - held.cached)
            held.cached = length
        else:
            held.cache, held.cached = None, 0

    def fork(self, sequence: int, length: int) -> int:
        self._ledger.check_keep(sequence, length)
        new, held = self._ledger.open(self.length(sequence)), self._sequences[sequence]
        self._sequences[new] = _Sequence(list(held.tokens), copy.deepcopy(held.cache), held.cached)
        self.keep(new, length)
        return new

    def close(self, sequence: int) -> None:
        self._ledger.close(sequence)
        del self._sequences[sequence]

    def nbytes(self) -> int:
        return sum(
            tensor.nbytes
            for held in self._sequences.values()
            if held.cache is not None
            for layer in held.cache.layers
            for tensor in vars(layer).values()
            if isinstance(tensor, Tensor)
        )


def _can_forget(cache: Any) -> bool:
    """Whether every layer still holds every position."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    def whole(layer: Any) -> bool:
        if type(layer) is DynamicSlidingWindowLayer:
            return bool(layer.get_seq_length() < layer.sliding_window)
        return type(layer) is DynamicLayer

    return all(whole(layer) for layer in cache.layers)
