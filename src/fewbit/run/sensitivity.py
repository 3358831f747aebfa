# SPDX-License-Identifier: Apache-2.0
"""The Fisher diagonal of every weight of the blocks: how much the loss minds a change of it; and of every output.

::

    F_ij = sum over sequences s of (d L_s / d W_ij)^2         L_s: mean cross-entropy of the next tokens of s
    O_i  = sum over tokens t of (d L_s / d y_ti)^2            y = x W^T, s: the sequence of t

of the float model (the empirical Fisher of SqueezeLLM, Kim et al. 2023, arXiv:2306.07629). The model is never in memory
as a whole. Forward, block by block, only what enters each block is kept, on disk; the gradient of the loss is taken at
the end; then blocks come backwards, each run once more on what entered it (gradient checkpointing), which gives the
gradients of its weights and of its layers' outputs, and the gradient at its inputs, for the block before. Memory is
that of one block, its Fisher diagonal, and the gradients of one sequence a worker and one more. The disk holds what
enters every block, or, where there is no room for that, every so many, and those in between when they are needed again,
for one more run forward.

On the way forward facts of the inputs of every layer can be collected as well.

Every step ends with a file that gets its name once it is durable, so a pass that was stopped goes on from there, and
sequences are added in their order: the bits depend on no thread.
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewbit.containers.safetensors import write_safetensors
from fewbit.core.defaults import products_in
from fewbit.core.facts import Facts
from fewbit.core.sums import all_finite
from fewbit.errors import InputError
from fewbit.memory import give_back
from fewbit.model.sites import Site, in_block
from fewbit.model.stream import Inputs, StreamedModel
from fewbit.run.events import Event, Progress
from fewbit.run.facts import fisher_file, inputs_file, outputs_key, read_fisher, read_outputs, write_inputs
from fewbit.run.hidden import HiddenFile
from fewbit.run.observe import Observer
from fewbit.run.workers import Workers


@dataclass
class Sensitivity:
    """One pass, and what it found.

    * ``ids`` (sequences, tokens). ``folder``: holds its files, and is made here.
    * ``wanted``: names of the sites whose Fisher diagonal is kept; those outside of blocks have none. With no name
      nothing is run backwards.
    * ``watched``: what to collect at the inputs of all sites of the blocks.
    * ``ranges``: whether to keep histograms of those inputs as well, of sites that may round them.
    * ``products``: dtype of matrix products; sums and squares are float32.
    """

    model: StreamedModel
    ids: Tensor
    folder: Path
    wanted: frozenset[str]
    workers: Workers
    tell: Progress
    products: torch.dtype = torch.float32
    watched: Literal["nothing", "mean_square", "gram"] = "nothing"
    ranges: bool = False
    _call: list[Inputs] = field(default_factory=list)

    def collect(self) -> None:
        """Do what is left to do.

        Raises:
            InputError: the disk is full, or a gradient is NaN or infinite; the message names the layer.
        """
        blocks = len(self.model.blocks)
        self.folder.mkdir(parents=True, exist_ok=True)
        left = next((block for block in range(blocks) if fisher_file(self.folder, block).exists()), blocks)
        whole = inputs_file(self.folder, blocks - 1).exists() if not self.wanted else left == 0
        if whole:
            return
        ways = "forward and backward" if self.wanted else "forward"
        self.tell(Event("note", message=f"{len(self.ids)} sequences through {blocks} blocks in float, {ways}"))
        if left == blocks and not self._path("gradient", blocks).exists():
            self._forward()
            if self.wanted:
                self._end()
        for block in reversed(range(left if self.wanted else 0)):
            self._backward(block)
            self.tell(Event("note", message=f"sensitivity of block {block + 1} of {blocks}"))

    def fisher(self, site: Site) -> list[Tensor] | None:
        """Float32 (rows, columns) of every expert of ``site`` (of the one matrix that it is otherwise); None where it
        was not wanted, or lies outside of the blocks."""
        if site.block is None or site.name not in self.wanted:
            return None
        return read_fisher(fisher_file(self.folder, site.block), site)

    def output_square(self, site: Site) -> list[Tensor] | None:
        """Float32 (rows,) of every expert of ``site``: O; None where there is no Fisher diagonal."""
        if site.block is None or site.name not in self.wanted:
            return None
        return read_outputs(fisher_file(self.folder, site.block), site)

    def _forward(self) -> None:
        """Keep what enters every block, and what leaves the last one."""
        model, blocks = self.model, len(self.model.blocks)
        done = next((n for n in reversed(range(blocks + 1)) if self._path("hidden", n).exists()), None)
        if done is None:
            with model.loaded(*model.before):
                self._write("hidden", 0, self.workers.map(lambda ids: model.begin(ids).hidden, self.ids.split(1)))
            done = 0
        for block in range(done, blocks):
            with model.loaded(model.blocks[block]):
                self._through(block, self.watched != "nothing")
            if not self.wanted or block % self._apart():
                self._path("hidden", block).unlink()
            if not self.wanted and block + 1 == blocks:
                self._path("hidden", blocks).unlink()
            give_back()

    def _apart(self) -> int:
        """Blocks from one whose input is kept to the next: 1, or about the root of their number where the disk has no
        room for all."""
        blocks, needed = len(self.model.blocks), 4 * math.prod(self._shape())
        return 1 if shutil.disk_usage(self.folder).free > 2 * blocks * needed else math.isqrt(blocks)

    def _again(self, block: int) -> None:
        """Bring back what enters ``block``, from the nearest block before it whose input was kept."""
        start = next(before for before in range(block, -1, -1) if self._path("hidden", before).exists())
        for before in range(start, block):
            with self.model.loaded(self.model.blocks[before]):
                self._through(before, watched=False)

    def _through(self, block: int, watched: bool) -> None:
        """The loaded ``block`` on what enters it, and facts of its sites' inputs where they are ``watched``."""
        model, call, source = self.model, self._inputs(), self._file("hidden", block)
        sites = list(in_block(model.sites, block))
        rounded = frozenset(site.name for site in sites if self.ranges and site.kind != "experts")
        observer = Observer({site.name for site in sites if self.watched == "gram"}, 0, rounded)

        def step(sequence: int) -> tuple[Tensor, dict[tuple[str, int], Facts]]:
            with observer.batch() as found, products_in(self.products):
                return model.run_finite(block, source.read(sequence), call).float(), found

        def merged() -> Iterator[Tensor]:
            for hidden, found in self.workers.map(step, range(len(self.ids))):
                observer.merge(found)
                yield hidden

        file = self._created("hidden", block + 1)
        with model.observe(block, observer, {site.name for site in sites if watched}):
            for index, hidden in enumerate(merged()):
                file.write(index, hidden)
        if watched:
            facts = {s.name: [observer.facts(s.name, e, s.shape[1]) for e in range(s.experts)] for s in sites}
            write_inputs(inputs_file(self.folder, block), facts)
        file.commit()
        source.close()

    def _end(self) -> None:
        """The gradient of every sequence's loss at the output of the last block."""
        model, blocks = self.model, len(self.model.blocks)
        source = self._file("hidden", blocks)

        def step(sequence: int) -> Tensor:
            ids, hidden = self.ids[sequence], source.read(sequence).requires_grad_()
            with torch.enable_grad():
                with products_in(self.products):
                    logits = model.logits(hidden)[0, :-1].float()
                loss = nn.functional.cross_entropy(logits, ids[1:])
                return torch.autograd.grad(loss, hidden)[0]

        with model.loaded(*model.after):
            self._write("gradient", blocks, self.workers.map(step, range(len(self.ids))))
        source.close()
        self._path("hidden", blocks).unlink(missing_ok=True)
        give_back()

    def _backward(self, block: int) -> None:
        """The Fisher diagonal of ``block``, and the gradient at its inputs."""
        model, call = self.model, self._inputs()
        self._again(block)
        hidden, above = self._file("hidden", block), self._file("gradient", block + 1)
        model.load(model.blocks[block])
        sites = [site for site in in_block(model.sites, block) if site.name in self.wanted]
        weights: list[Tensor] = [model.module.get_parameter(site.parameter).requires_grad_() for site in sites]
        made = _Outputs(sites)

        def step(sequence: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            x = hidden.read(sequence).requires_grad_()
            with torch.enable_grad(), made.kept() as outputs:
                with products_in(self.products):
                    y = model.run_block(block, x, call)
                of = [x, *weights, *(output for _, output in outputs)]
                found = torch.autograd.grad(y, of, above.read(sequence).to(y.dtype), allow_unused=True)
            own, at_outputs = found[1 : len(weights) + 1], found[len(weights) + 1 :]
            squares = [w.new_zeros(1) if g is None else g.square_() for g, w in zip(own, weights, strict=True)]
            return torch.zeros_like(x) if found[0] is None else found[0], squares, made.squares(outputs, at_outputs)

        totals = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        below = self._created("gradient", block)
        with model.observe(block, made, {site.name for site in sites}, outputs=True):
            for sequence, (gradient, squares, outputs) in enumerate(self.workers.map(step, range(len(self.ids)))):
                below.write(sequence, gradient)
                for total, square in zip((*totals, *made.totals), (*squares, *outputs), strict=True):
                    total += square
        below.commit()
        hidden.close()
        above.close()
        model.free(model.blocks[block])
        found = {**_named(sites, totals), **made.named()}
        write_safetensors(fisher_file(self.folder, block), found, {"format": "pt"})
        self._path("gradient", block + 1).unlink(missing_ok=True)
        for done in ("hidden", "gradient") if block == 0 else ("hidden",):
            self._path(done, block).unlink(missing_ok=True)
        give_back()

    def _inputs(self) -> Inputs:
        """What blocks are called with for one sequence: the same for all of them, as all are as long."""
        if not self._call:
            with self.model.loaded(*self.model.before):
                self._call.append(replace(self.model.begin(self.ids[:1]), hidden=torch.zeros(0)))
        return self._call[0]

    def _path(self, what: str, block: int) -> Path:
        return self.folder / f"{what}-{block:05d}.f32"

    def _file(self, what: str, block: int) -> HiddenFile:
        return HiddenFile(self._path(what, block), self._shape(), "read")

    def _created(self, what: str, block: int) -> HiddenFile:
        return HiddenFile(self._path(what, block), self._shape(), "create")

    def _shape(self) -> tuple[int, int, int, int]:
        sequences, tokens = self.ids.shape
        return sequences, 1, tokens, self.model.config.get_text_config().hidden_size

    def _write(self, what: str, block: int, sequences: Any) -> None:
        file = self._created(what, block)
        for index, values in enumerate(sequences):
            file.write(index, values)
        file.commit()


class _Outputs:
    """A callback for ``StreamedModel.observe``: what the layers ``sites`` make, kept until gradients are taken; each
    thread keeps its own. ``totals``: float32 (experts, rows) of each, their sums of squares."""

    def __init__(self, sites: list[Site]) -> None:
        self._sites, self._local = sites, threading.local()
        self._place = {site.name: place for place, site in enumerate(sites)}
        self.totals = [torch.zeros(site.experts, site.shape[0]) for site in sites]

    @contextmanager
    def kept(self) -> Iterator[list[tuple[tuple[int, int], Tensor]]]:
        """What is made while open, as ((place of the site, expert), tensor)."""
        self._local.found = []
        try:
            yield self._local.found
        finally:
            self._local.found = []

    def __call__(self, site: str, y: Tensor, expert: int | None) -> None:
        self._local.found.append(((self._place[site], expert or 0), y))

    def squares(
        self, outputs: list[tuple[tuple[int, int], Tensor]], gradients: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """What one sequence adds to ``totals``."""
        sums = [torch.zeros_like(total) for total in self.totals]
        for ((place, expert), _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                sums[place][expert] += gradient.float().square().flatten(0, -2).sum(0)
        return sums

    def named(self) -> dict[str, Tensor]:
        """What a file holds."""
        return {outputs_key(site.name): total for site, total in zip(self._sites, self.totals, strict=True)}


def _named(sites: list[Site], totals: list[Tensor]) -> dict[str, Tensor]:
    """What a file holds: float32 (experts * rows, columns) by name of the site.

    Raises:
        InputError: a sum is NaN or infinite.
    """
    found = {}
    for site, total in zip(sites, totals, strict=True):
        if not all_finite(total):
            works = "check that the model runs in float on the calibration text"
            raise InputError(f"the sensitivity of {site.name}", "the gradient of the loss is NaN or infinite", works)
        whole = total.transpose(-1, -2) if site.transposed else total
        found[site.name] = whole.reshape(-1, site.shape[1]).contiguous()
    return found
