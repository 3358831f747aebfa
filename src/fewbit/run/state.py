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

from fewbit.calibrate import Calibration
from fewbit.model.stream import Inputs, StreamedModel
from fewbit.recipe import ModelTune
from fewbit.run.events import Progress
from fewbit.run.facts import KeptFacts
from fewbit.run.hidden import HiddenBatches, HiddenFile
from fewbit.run.journal import Journal
from fewbit.run.planning import Plan
from fewbit.run.sensitivity import Sensitivity
from fewbit.run.workers import Workers

TOGETHER = 8
"""Windows of the probe that go through the model at once: products of few tokens are slow."""
SHOWN = 128
"""Tokens of the probe on which a layer's relative output error is measured."""
STATE = "state"
"""Folder, in that of a run, of what is gone once it is finished."""
HELD = 256 << 20
"""Bytes of activations kept in memory, of one kind: what enters a block, and at most two kinds inside of it."""


@dataclass
class Run:
    """Everything a stage needs. ``probe`` (windows, tokens) is held-out text that the run checks itself on; ``seed``
    is what anything random is drawn from; ``device`` where tuned blocks run; ``sensitivity`` is there where a method
    asks for the Fisher diagonal, ``kept`` where facts were collected beforehand, and ``end`` where the model learns as
    a whole once all blocks are done, from ``whole`` where that is more text than the ``calibration``; ``correct_bias``:
    see :mod:`fewbit.core.correction`."""

    model: StreamedModel
    plan: Plan
    folder: Path
    journal: Journal
    calibration: Calibration | None
    batch: int
    probe: Tensor
    workers: Workers
    progress: Progress
    calibration_dtype: torch.dtype
    seed: int
    device: str = "cpu"
    sensitivity: Sensitivity | None = None
    kept: KeptFacts | None = None
    end: ModelTune | None = None
    correct_bias: bool = False
    whole: Calibration | None = None
    began: float = field(default_factory=time.monotonic)
    calls: dict[str, Inputs] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """Where activations and the journal lie while the run goes on."""
        return self.folder / STATE

    @property
    def map(self) -> Callable[..., Iterator[Any]]:
        """Calls a function of every item, in their order: on the workers, or one by one where a GPU does the work."""
        return self.workers.map if torch.device(self.device).type == "cpu" else map

    def arithmetic(self, device: str = "cpu") -> AbstractContextManager[Any]:
        """What calibration computes in: matrix products in ``calibration_dtype``, sums and facts in float32."""
        return torch.autocast(device, self.calibration_dtype, enabled=self.calibration_dtype != torch.float32)

    def inputs(self, what: str) -> Inputs:
        """What blocks are called with for a batch of "probe" or "calibration", for a "sample", which is a window of the
        former, for a "window" of the latter, or for what is "shown" to layers; equal for all batches of a kind."""
        if what not in self.calls:
            with self.model.loaded(*self.model.before):
                self.note_inputs()
        return self.calls[what]

    def note_inputs(self) -> None:
        """Prepare :meth:`inputs`, while what runs before the blocks is loaded."""
        batch = (self.batches() or [self.probe])[0]
        ids = {"probe": self.probe[:TOGETHER], "shown": self.probe[: self.shown], "sample": self.probe[:1]}
        ids |= {"calibration": batch, "window": batch[:1]}
        empty = torch.zeros(0)
        self.calls = {key: replace(self.model.begin(value), hidden=empty) for key, value in ids.items()}

    @property
    def shown(self) -> int:
        """Windows of the probe that hold :data:`SHOWN` tokens."""
        return -(-SHOWN // self.probe.shape[1])

    @property
    def stages(self) -> int:
        return len(self.model.blocks) + 2

    def shard(self, stage: int) -> str:
        return f"model-{stage + 1:05d}-of-{self.stages:05d}.safetensors"

    def batches(self) -> list[Tensor]:
        return [] if self.calibration is None else list(self.calibration.ids.split(self.batch))

    def hidden(self, stage: int, what: str, create: bool = False) -> HiddenFile:
        """Activations after ``stage`` of the "probe", whose file holds (quantized path, float path); of the
        "calibration" on the quantized path; of it on the float path, "reference"; and "own", what the float block of
        the stage makes of the quantized path before it."""
        width = self.model.config.get_text_config().hidden_size
        if what == "probe":
            shape = (2, *self.probe.shape, width)
        else:
            ids = self.batches()
            shape = (len(ids), *ids[0].shape, width)
        return HiddenFile(self.state / f"{what}-{stage:05d}.f32", shape, "create" if create else "read")

    def scratch(self, name: str, width: int, dtype: torch.dtype) -> HiddenFile | HiddenBatches:
        """Room for the calibration's activations inside of a block, (batches, batch, tokens, ``width``): on disk where
        that is more than :data:`HELD` bytes."""
        ids = self.batches()
        shape = (len(ids), *ids[0].shape, width)
        if math.prod(shape) * dtype.itemsize <= HELD:
            return HiddenBatches(shape, dtype)
        return HiddenFile(self.state / name, shape, "scratch", dtype)
