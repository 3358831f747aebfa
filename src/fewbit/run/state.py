# SPDX-License-Identifier: Apache-2.0
"""What a run is: everything that its stages need."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.calibrate import Calibration, Text
from fewbit.core.defaults import products_in
from fewbit.model.stream import Inputs, StreamedModel
from fewbit.recipe import Recipe
from fewbit.run.effort import BATCH_TOKENS
from fewbit.run.events import Progress
from fewbit.run.facts import KeptFacts
from fewbit.run.hidden import HiddenBatches, HiddenFile
from fewbit.run.journal import Journal
from fewbit.run.planning import Plan
from fewbit.run.sensitivity import Sensitivity
from fewbit.run.workers import Workers

TOGETHER = 16
"""Windows of the probe that go through the model at once: products of few tokens are slow."""
SHOWN = 128
"""Tokens of the probe on which a layer's relative output error is measured."""
STATE = "state"
"""Folder, in that of a run, of what is gone once it is finished."""
HELD = 256 << 20
"""Bytes of activations kept in memory, of one kind: what enters a block, and at most three kinds inside of it."""


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, as :func:`fewbit.quantize` names it. ``products``: the dtype of matrix products in
    blocks that calibrate; ``device``: where tuned blocks run; ``correct_bias``: see :mod:`fewbit.core.correction`."""

    recipe: Recipe
    text: Text
    seed: int
    facts: str | Path | None
    products: torch.dtype
    device: str
    correct_bias: bool
    force: bool


@dataclass(frozen=True, eq=False)
class Texts:
    """``calibration``: windows for the blocks, None where nothing needs any; ``whole``: all that the model learns from
    as a whole, of which these are some; ``probe`` (windows, tokens): held-out text that the run checks itself on."""

    calibration: Calibration | None
    whole: Calibration | None
    probe: Tensor

    @property
    def batch(self) -> int:
        """Windows at once: the largest divisor of their number that stays within :data:`BATCH_TOKENS`, so batches are
        equal."""
        if self.calibration is None:
            return 1
        number, context = self.calibration.ids.shape
        return next(size for size in range(max(1, BATCH_TOKENS // context), 0, -1) if number % size == 0)

    @property
    def batches(self) -> list[Tensor]:
        """The windows for the blocks."""
        return [] if self.calibration is None else list(self.calibration.ids.split(self.batch))


@dataclass
class Run:
    """Everything a stage needs. ``kept``: facts that were collected beforehand, if any; ``sensitivity`` is there where
    a method asks for the Fisher diagonal."""

    asked: Asked
    model: StreamedModel
    plan: Plan
    folder: Path
    journal: Journal
    texts: Texts
    kept: KeptFacts | None
    workers: Workers
    progress: Progress
    sensitivity: Sensitivity | None = None
    began: float = field(default_factory=time.monotonic)
    calls: dict[str, Inputs] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """Where activations and the journal lie while the run goes on."""
        return self.folder / STATE

    @property
    def map(self) -> Callable[..., Iterator[Any]]:
        """Calls a function of every item, in their order: on the workers, or one by one where a GPU does the work."""
        return self.workers.map if torch.device(self.asked.device).type == "cpu" else map

    def arithmetic(self, device: str = "cpu") -> AbstractContextManager[Any]:
        """What calibration computes in: matrix products in ``products``, sums and facts in float32."""
        return products_in(self.asked.products, device)

    def inputs(self, what: str) -> Inputs:
        """What blocks are called with for a batch of "probe" or "calibration", for a "sample", which is a window of the
        former, for a "window" of the latter, or for what is "shown" to layers; equal for all batches of a kind."""
        if what not in self.calls:
            with self.model.loaded(*self.model.before):
                self.note_inputs()
        return self.calls[what]

    def note_inputs(self) -> None:
        """Prepare :meth:`inputs`, while what runs before the blocks is loaded."""
        probe = self.texts.probe
        batch = (self.texts.batches or [probe])[0]
        ids = {"probe": probe[:TOGETHER], "shown": probe[: self.shown], "sample": probe[:1]}
        ids |= {"calibration": batch, "window": batch[:1]}
        empty = torch.zeros(0)
        self.calls = {key: replace(self.model.begin(value), hidden=empty) for key, value in ids.items()}

    @property
    def shown(self) -> int:
        """Windows of the probe that hold :data:`SHOWN` tokens."""
        return -(-SHOWN // self.texts.probe.shape[1])

    @property
    def stages(self) -> int:
        return len(self.model.blocks) + 2

    def shard(self, stage: int) -> str:
        return f"model-{stage + 1:05d}-of-{self.stages:05d}.safetensors"

    def hidden(self, stage: int, what: str, create: bool = False) -> HiddenFile:
        """Activations after ``stage`` of the "probe", whose file holds (quantized path, float path); of the
        "calibration" on the quantized path; of it on the float path, "reference"; and "own", what the float block of
        the stage makes of the quantized path before it."""
        width = self.model.config.get_text_config().hidden_size
        if what == "probe":
            shape = (2, *self.texts.probe.shape, width)
        else:
            ids = self.texts.batches
            shape = (len(ids), *ids[0].shape, width)
        return HiddenFile(self.state / f"{what}-{stage:05d}.f32", shape, "create" if create else "read")

    def scratch(self, name: str, width: int, dtype: torch.dtype) -> HiddenFile | HiddenBatches:
        """Room for the calibration's activations inside of a block, (batches, batch, tokens, ``width``): on disk where
        that is more than :data:`HELD` bytes."""
        ids = self.texts.batches
        shape = (len(ids), *ids[0].shape, width)
        if math.prod(shape) * dtype.itemsize <= HELD:
            return HiddenBatches(shape, dtype)
        return HiddenFile(self.state / name, shape, "scratch", dtype)
