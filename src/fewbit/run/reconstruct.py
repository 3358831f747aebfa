# SPDX-License-Identifier: Apache-2.0
"""A block whose layers are solved, tuned as a whole: one loop for whatever can be learned.

What is compared: the block with its quantized layers on what the quantized blocks before it make of the calibration,
and the float block on what the float blocks make of it, both at the block's output (after both residual additions).
So a block also makes up for what those before it lost. (The code of AutoRound and of EfficientQAT's first phase has the
same two inputs.) With y_t what is wanted at token t and e_t what is missing, the loss is the mean over tokens of
``|e_t|^2 / |y_t|^(2 relative)``: 0 is the papers' mean square; 1 counts every token alike, as the norm that reads it.
Without that, the first token of a window, which in many models is a hundred times as large as others, decides alone.
``cosine`` adds that many times the mean of ``-log cos(y_t, y_t + e_t)``; ``own`` adds that many times the same loss
against what the float block makes of the very inputs of the quantized one. (1 and 1, with ``relative`` 0, are the loss
of PTQ1.61, arXiv:2502.13179.)

The loss that decides is that of all windows, taken before the first step, in between and after the last: the values of
least loss are kept, and where no step lowered it the block stays as it was solved. Windows are drawn by the seed;
gradients of a batch are worked out a window a worker and added up in order, so that any number of threads gives the
same bytes. Both streams lie in files of which a window a worker is in memory; on a GPU, in its memory where they fit.

On a GPU, where one is asked for, the block and what is learned lie there, some windows are one batch, and a step is
recorded (:mod:`fewbit.run.recorded`). What comes out is checked like anything else, but its bytes are promised neither
to equal a CPU's nor those of the next run.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fewbit.core.descent import Descent, schedule
from fewbit.core.terms import matrices
from fewbit.core.transform import generator_of
from fewbit.core.tuning import Learnable, Values
from fewbit.measure.memory import peak_rss_bytes
from fewbit.memory import give_back
from fewbit.model.stream import with_replaced, with_weight
from fewbit.recipe import Tune
from fewbit.run.collect import calibration_through
from fewbit.run.events import Event
from fewbit.run.hidden import HiddenFile, HiddenTensor, fits
from fewbit.run.recorded import Part, Recorded
from fewbit.run.rewriting import placed, straight_through
from fewbit.run.solve import Solved, retuned, turns
from fewbit.run.state import Run
from fewbit.run.tasks import propagate

LOOKS = 2
"""How often the loss of all windows is taken on the way."""

LEAST_COSINE = 1e-3
"""Where the logarithm of a cosine ends: a token turned around has no gradient."""

Grads = list[Tensor]


def tuned(run: Run) -> bool:
    """Whether any block of the run is."""
    return any(rule.tunings() for rule in run.plan.rules.values())


def reference_on(run: Run, stage: int, index: int) -> None:
    """Take the float path of the calibration through block ``index``, still in float, and keep it; and the quantized
    path, where a loss asks for it."""
    calibration_through(run, stage, index, "reference", "reference").commit()
    asked = (tune for d in run.plan.decisions if d.site.block == index and d.rule for tune in d.rule.tunings())
    if any(tune.settings["own"] for tune in asked):
        calibration_through(run, stage, index, "calibration", "own").commit()


def tune_block(run: Run, stage: int, index: int, solved: list[Solved]) -> list[Solved]:
    """The tunings that the rules of ``solved`` ask for, in order; equal ones of several layers at once.

    The decoded weights of what comes out are in the loaded block.
    """
    for place, tune, members in turns({i: item.tunings for i, item in enumerate(solved)}):
        solved = _Phase(run, stage, index, solved, members, tune, place).done()
        give_back()
    return solved


class _Phase:
    """One tuning of the layers ``members`` of ``solved``, the others standing still."""

    def __init__(
        self, run: Run, stage: int, index: int, solved: list[Solved], members: list[int], tune: Tune, place: int
    ) -> None:
        self._run, self._index, self._solved, self._members = run, index, solved, members
        self._row = tune.row()
        options = tune.settings
        self._iters, self._lr = int(options["iters"]), float(options["lr"])
        self._relative, self._cosine, self._own = (float(options[key]) for key in ("relative", "cosine", "own"))
        self._windows = sum(len(ids) for ids in run.texts.batches)
        self._device = torch.device(run.asked.device)
        self._together = 1 if self._device.type == "cpu" else run.texts.batch
        batch = min(int(options["batch"]), self._windows)
        self._drawn = min(batch, max(self._together, batch // self._together * self._together))
        self._inputs = self._one_by_one(stage - 1, "calibration")
        self._wanted = self._one_by_one(stage, "reference")
        self._targets = [(1.0, self._wanted)]
        if self._own:
            self._targets.append((self._own, self._one_by_one(stage, "own")))
        self._map = run.map
        self._calls = placed(run.inputs("window" if self._together == 1 else "calibration").calls[index], self._device)
        block = run.model.module.get_submodule(run.model.blocks[index])
        self._bare = block if self._device.type == "cpu" else copy.deepcopy(block).to(self._device)
        name = f"{run.model.blocks[index]} {place} {tune.name}"
        self._generator = generator_of(run.asked.seed, name)

    def done(self) -> list[Solved]:
        """What was solved, ``members`` tuned."""
        began, run = time.monotonic(), self._run
        chosen = [self._solved[i] for i in self._members]
        learners = list(self._map(lambda item: self._row.learn(*placed(item.unpacked(), self._device)), chosen))
        start, least, best = self._learn(learners)
        self._inputs.close()
        for _, file in self._targets:
            file.close()
        what = "root of the loss" if self._cosine or self._own else "output error"
        outcome = f"{what} {start:.3%} -> {least:.3%} by {self._row.name}"
        note = f"{run.model.blocks[self._index]}: {outcome}, {time.monotonic() - began:.1f} s"
        run.progress(Event("note", message=note, peak_rss_bytes=peak_rss_bytes()))
        if best is None:
            return [retuned(item, None, outcome) if i in self._members else item for i, item in enumerate(self._solved)]
        pairs = zip(learners, best, strict=True)
        ends = [placed(learner.freeze(values), torch.device("cpu")) for learner, values in pairs]
        frozen = dict(zip(self._members, ends, strict=True))
        result = [
            retuned(item, frozen[i], outcome) if i in self._members else item for i, item in enumerate(self._solved)
        ]
        for i in self._members:
            propagate(run.model, result[i])
        return result

    def _learn(self, learners: list[Learnable]) -> tuple[float, float, list[Values] | None]:
        """Relative output error before and after, and the best values; None where no step lowered the loss."""
        firsts = [matrices(self._solved[i].weight)[0].format for i in self._members]
        rates = [self._lr or self._row.rate(self._iters, format) for format in firsts]
        pairs = zip(learners, rates, strict=True)
        descents = [Descent(one.start, one.bounds, self._row.descend(), rate) for one, rate in pairs]
        values = [each.values for each in descents]
        names = [self._solved[i].record["name"] for i in self._members]
        before = [self._run.model.weight(name).to(self._device, copy=True) for name in names]
        power = self._power()
        start = least = self._loss(before)
        best: list[Values] | None = None
        slopes = Recorded(lambda parts: self._slopes(learners, values, parts), self._device)
        for share, look in schedule(self._iters, LOOKS):
            drawn = torch.randperm(self._windows, generator=self._generator)[: self._drawn].tolist()
            found = slopes(self._parts(drawn))

            def move(one: int, found: list[Values] = found, share: float = share) -> None:
                descents[one].step(found[one], share)

            for _ in self._map(move, range(len(learners))):
                pass
            if look and (loss := self._loss(self._weights(learners, values))) < least:
                least, best = loss, [each.copy() for each in descents]
        return (start / power) ** 0.5, (least / power) ** 0.5, best

    def _weights(self, learners: list[Learnable], values: Sequence[Values]) -> Grads:
        return list(self._map(lambda pair: pair[0].weight(pair[1]), zip(learners, values, strict=True)))

    def _slopes(self, learners: list[Learnable], values: Sequence[Values], parts: Iterable[Part]) -> list[Values]:
        """Of the loss of ``parts``, by ``values``."""
        grads = self._gradients(self._weights(learners, values), parts)
        work = zip(learners, values, grads, strict=True)
        return list(self._map(lambda one: one[0].gradient(one[1], one[2]), work))

    def _multiplied(self, weights: Grads) -> Grads:
        """``weights`` of the members as products take them, rounded once and not again with every window; in layers
        that do more than multiply by them, as they are."""
        start, dtype = len(self._run.model.blocks[self._index]) + 1, self._run.asked.products
        paths = [self._solved[i].record["name"][start:] for i in self._members]
        plain = [type(self._bare.get_submodule(path)) is nn.Linear for path in paths]
        return [weight.to(dtype) if one else weight for weight, one in zip(weights, plain, strict=True)]

    def _block(self, weights: Grads) -> Callable[[Tensor], Tensor]:
        """The block with ``weights`` in place of those of the members."""
        model, start = self._run.model, len(self._run.model.blocks[self._index]) + 1
        given = dict(zip(self._members, weights, strict=True))
        parts = {}
        for i, item in enumerate(self._solved):
            path = item.record["name"]
            if i in given or item.rewrite.steps or item.activation is not None:
                site = model.site(path)
                twin = _twin(self._bare.get_submodule(path[start:]), item, self._device)
                with torch.enable_grad():
                    parts[path[start:]] = with_weight(twin, site, given[i]) if i in given else twin
        block = with_replaced(self._bare, parts)
        arguments, named = self._calls

        def run(hidden: Tensor) -> Tensor:
            with self._run.arithmetic(self._device.type):
                out = block(hidden, *arguments, **named)
            return (out[0] if isinstance(out, tuple) else out).float()  # type: ignore[no-any-return]

        return run

    def _gradients(self, weights: Grads, parts: Iterable[Part]) -> Grads:
        """Of the loss of ``parts``, a batch, by each of ``weights``."""
        leaves = [weight.detach().requires_grad_() for weight in self._multiplied(weights)]
        block, total = self._block(leaves), [torch.zeros_like(weight) for weight in weights]

        def one(part: Part) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(self._lost(block, part) * (len(part[0]) / self._drawn), leaves)

        for found in self._map(one, parts):
            for sum_, grad in zip(total, found, strict=True):
                sum_ += grad
        return total

    def _loss(self, weights: Grads) -> float:
        """The loss of all windows."""
        block = self._block(self._multiplied(weights))

        def one(part: Part) -> float:
            return float(self._lost(block, part, torch.float64)) * len(part[0])

        return float(sum(self._map(one, self._parts(range(self._windows))))) / self._windows

    def _parts(self, windows: Sequence[int]) -> Iterator[Part]:
        """What goes through the block at once, as many windows as what it was called with fits: its inputs, and what is
        wanted by each of the targets; (windows, tokens, columns)."""
        files = [self._inputs, *(file for _, file in self._targets)]
        for i in range(0, len(windows), self._together):
            some = windows[i : i + self._together]
            yield tuple(torch.cat([file.read(window) for window in some]).to(self._device) for file in files)

    def _lost(self, block: Callable[[Tensor], Tensor], part: Part, sums: torch.dtype = torch.float32) -> Tensor:
        """The loss of ``part``, means being taken in ``sums``."""
        made, total = block(part[0]), torch.zeros((), dtype=sums, device=self._device)
        for (share, _), wanted in zip(self._targets, part[1:], strict=True):
            total = total + share * ((made - wanted) * self._units(wanted)).square().mean(dtype=sums)
            if self._cosine:
                alike = torch.cosine_similarity(made, wanted, dim=-1).clamp_min(LEAST_COSINE)
                # for small errors half of |e across y|^2 / |y|^2: the unit of the rest, where relative is 1
                total = total - share * self._cosine * alike.log().mean(dtype=sums)
        return total

    def _one_by_one(self, stage: int, name: str) -> HiddenFile | HiddenTensor:
        """Activations of the run, read a window at a time; on a GPU that has room for them, from its memory."""
        file = self._run.hidden(stage, name)
        file.close()
        alone = HiddenFile(file.path, (self._windows, 1, *file.shape[2:]), "read")
        if not fits(alone.nbytes, self._device):
            return alone
        held = HiddenTensor.of(alone, self._device)
        alone.close()
        return held

    def _units(self, wanted: Tensor) -> Tensor:
        """What errors of each token are multiplied by, (windows, tokens, 1)."""
        return wanted.square().mean(-1, keepdim=True).clamp_min(1e-20).pow(-self._relative / 2)

    def _power(self) -> float:
        """Mean square of what is wanted."""

        def one(window: int) -> float:
            wanted = self._wanted.read(window)
            return float((wanted * self._units(wanted)).square_().mean(dtype=torch.float64))

        return float(sum(self._map(one, range(self._windows)))) / self._windows or 1.0


def _twin(module: nn.Module, item: Solved, device: torch.device) -> nn.Module:
    """``module`` with input hooks of its own: inputs are rewritten and rounded as when the model runs, and gradients go
    straight through that rounding."""
    twin = copy.copy(module)
    twin._forward_pre_hooks = OrderedDict({0: straight_through(item, device)})
    return twin
