# SPDX-License-Identifier: Apache-2.0
"""What a layer's error costs the whole model, measured: KL of its logits, in nats a token, when it alone is changed.

Windows go through the model block by block. What enters a block is kept while its units are tried: each of their
candidates takes the place of the weights, the rest of the model runs, the weights come back. The whole model is in
memory in float32, and the logits of the float model, 4 bytes x windows x tokens x vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewbit.model.stream import Inputs, StreamedModel
from fewbit.run.compare import compare_logits, summary
from fewbit.run.workers import Workers

Weights = Mapping[str, Tensor]
"""(experts * rows, columns) by name of the site."""


@dataclass
class Divergence:
    """``model``, loaded as a whole, whose blocks are in float when this is made; ``ids`` (windows, tokens)."""

    model: StreamedModel
    ids: Tensor
    workers: Workers
    _started: list[Tensor] = field(default_factory=list)
    _call: list[Inputs] = field(default_factory=list)
    _reference: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        begun = list(self.workers.map(self.model.begin, self.ids.split(1)))
        self._started = [inputs.hidden for inputs in begun]
        self._call = [replace(begun[0], hidden=torch.zeros(0))]
        self._reference = list(self.workers.map(lambda hidden: self._logits(0, hidden), self._started))

    def put(self, weights: Weights) -> None:
        """Into the model."""
        for name, values in weights.items():
            self.model.set_weight(name, values.reshape(self.model.weight(name).shape))

    def now(self) -> float:
        """KL of the model as it is."""
        return self._after(0, self._started)

    def blocks(self) -> Iterator[Measure]:
        """One after the other, a way to measure changes of each; the model must be the same again when the next one is
        asked for."""
        hidden = self._started
        for block in range(len(self.model.blocks)):
            yield Measure(self, block, hidden)
            hidden = list(self.workers.map(lambda h, at=block: self._block(at, h), hidden))  # type: ignore[misc]

    def _after(self, block: int, hidden: Sequence[Tensor]) -> float:
        """KL, from what enters ``block`` on."""
        triples = zip(hidden, self._reference, self.ids[:, 1:].split(1), strict=True)
        compared = self.workers.map(
            lambda one: compare_logits(self._logits(block, one[0])[:, :-1], one[1][:, :-1], one[2]), triples
        )
        return float(summary(compared)["kl_mean"])

    def _logits(self, block: int, hidden: Tensor) -> Tensor:
        for at in range(block, len(self.model.blocks)):
            hidden = self._block(at, hidden)
        return self.model.logits(hidden).float()

    def _block(self, block: int, hidden: Tensor) -> Tensor:
        return self.model.run_block(block, hidden, self._call[0])


@dataclass(frozen=True)
class Measure:
    """What enters ``block``, of every window."""

    whole: Divergence
    block: int
    hidden: Sequence[Tensor]

    def of(self, weights: Weights) -> float:
        """KL of the model with ``weights``, all of this block, in place of its own."""
        before = {name: self.whole.model.weight(name).clone() for name in weights}
        self.whole.put(weights)
        found = self.whole._after(self.block, self.hidden)
        self.whole.put(before)
        return found
