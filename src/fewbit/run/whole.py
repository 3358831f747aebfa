# SPDX-License-Identifier: Apache-2.0
r"""What the whole model learns in the end: to answer as the float model does.

After EfficientQAT's second phase (Chen et al. 2024, arXiv:2407.11062): everything is quantized, codes stand still, and
what scales them is learned through all layers at once. The loss is that of distillation (Hinton et al. 2015,
arXiv:1503.02531) instead of the next token's: with p_t what the float model foretells after token t of a window, and
q_t what the quantized one does, over all tokens but the last::

    loss = mean of KL(p_t || q_t) + label * mean of -log q_t(next token)

Which layer learns what is :attr:`fewbit.core.tuning.ModelTuning.by`; embedding and head stand still. ``vectors``: as
well as that, vectors that are stored in float and in no layer (weights of norms, biases), as they are stored.

The float model runs once, for its last block's outputs, which go to a file; from them and its own head come p_t. Then
the quantized model, decoded, is in its place: 4 bytes a weight, as many for what is learned, for gradients and for each
worker, and activations of one block, as blocks run again on the way back. An eighth of the windows is held out. Kept
are the values whose codes and scales, as files hold them, lose least there in float32; where none lose less than the
start, nothing changes. Gradients of windows are added up in order: any number of threads gives the same bytes. The
phase is not resumed halfway: a run that is stopped in it begins it again.

A GPU wants few and large operations: there, layers of one format and width learn as one matrix, some windows are one
batch, outputs and activations stay in its memory where they fit, and the gradient of a batch is recorded
(:mod:`fewbit.run.recorded`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fewbit.containers import terms as T
from fewbit.core.descent import Adam, Descent, schedule
from fewbit.core.qtensor import unstack
from fewbit.core.transform import generator_of
from fewbit.measure.memory import peak_rss_bytes
from fewbit.memory import give_back
from fewbit.methods.floats import RATE, FloatVector
from fewbit.model.loading import place
from fewbit.model.stream import Inputs
from fewbit.run.events import Event
from fewbit.run.hidden import HiddenFile, HiddenTensor, fits
from fewbit.run.members import Candidate, Member, Part, begin, fitting, joined
from fewbit.run.recorded import Recorded
from fewbit.run.rewriting import placed, straight_through
from fewbit.run.solve import Solved
from fewbit.run.state import Run
from fewbit.run.verify import read_back, read_rewrite

LOOKS = 8
"""How often the windows that are held out are looked at."""
TOLD = 20
"""How often the loss is told."""
TOGETHER = 8192
"""Tokens that a GPU takes at once."""
ACTIVATIONS = 68
"""Bytes that a block keeps for its way back, by token and column of its input (Korthikanti et al. 2022,
arXiv:2205.05198, section 4.1, in twice the precision)."""
HELD = 8
"""One window of so many is held out, at most MOST_HELD, at least one."""
MOST_HELD = 16


@dataclass(frozen=True, eq=False)
class Found:
    """What was learned: weights of layers, unpacked, and vectors by the parameter's name; and the mean loss of what was
    held out before and after. ``still``: layers that learn nothing, and why."""

    layers: dict[str, T.Weight]
    vectors: dict[str, Tensor]
    before: float
    after: float
    still: dict[str, str]


@dataclass(frozen=True, eq=False)
class _Windows:
    """Some windows on their way: what the first block is called with, ``ids`` (windows, tokens), and the last block's
    outputs in the float model."""

    inputs: Inputs
    ids: Tensor
    floating: Tensor


def stored(run: Run) -> list[Solved]:
    """Every layer as the shards of ``run`` hold it."""
    found = []
    for stage in run.journal.stages:
        path = run.folder / stage["file"]
        found += [Solved(read_back(path, one), one, read_rewrite(path, one)) for one in stage["layers"]]
    return found


class Whole:
    """The model of ``run``, all of it in memory, quantized and about to learn."""

    def __init__(self, run: Run) -> None:
        end, data = run.asked.recipe.end, run.texts.calibration
        assert end is not None and data is not None
        self._run, self._row, self.options = run, end.row(), end.settings
        self._device, self._model = torch.device(run.asked.device), run.model
        self._alone = self._device.type == "cpu"
        self._together = 1 if self._alone else max(1, TOGETHER // data.ids.shape[1])
        self._map = run.map
        self._ids = (run.texts.whole or data).ids
        number = len(self._ids)
        held = min(MOST_HELD, max(1, number // HELD))
        self._held = list(range(number - held, number))
        self._learned_from = list(range(number - held)) or self._held
        self._generator = generator_of(run.asked.seed, end.name)
        self._model.load("")
        self._model.module.to(self._device)
        self._wanted = self._model.logits_as_now()
        self._float = self._float_path()
        self.still: dict[str, str] = {}
        self._calls: list[Any] = []
        self._hooks = ExitStack()
        self._members = self._quantized(stored(run))
        self._leaves = [[self._leaf(part) for part in member.parts] for member in self._members]

    def _float_path(self) -> HiddenFile | HiddenTensor:
        """The last block's outputs in the float model, a window an entry."""
        width = self._model.config.get_text_config().hidden_size
        shape = (len(self._ids), 1, self._ids.shape[1], width)
        self._again = not fits(ACTIVATIONS * self._together * shape[2] * width * len(self._model.blocks), self._device)
        if fits(4 * math.prod(shape), self._device):
            file: HiddenFile | HiddenTensor = HiddenTensor(shape, self._device)
        else:
            file = HiddenFile(self._run.state / "float", shape, "scratch")

        def one(windows: list[int]) -> None:
            inputs = self._model.begin(self._ids[windows].to(self._device))
            for window, hidden in zip(windows, self._through(inputs).split(1), strict=True):
                file.write(window, hidden.float())

        for _ in self._map(one, self._parts(range(len(self._ids)))):
            pass
        return file

    def _quantized(self, layers: list[Solved]) -> list[Member]:
        """Put what ``layers`` decode to, and other parameters as stored, into the model; what can be learned."""
        run, model, members = self._run, self._model, []
        skipped = [d.site.parameter for d in run.plan.decisions if d.rule is None and d.site.tied_to is None]
        for name in [*(name for name, _ in model.kept), *skipped]:
            parameter = model.module.get_parameter(name)
            parameter.data = parameter.to(run.plan.kept_dtype).float()
        candidates = []
        for item in layers:
            name, site = item.record["name"], model.site(item.record["name"])
            candidates += [] if site.block is None else self._candidates(item)
            for each in model.sites:
                if name in (each.name, each.tied_to):
                    model.set_weight(each.name, item.weight.dequantize().reshape(model.weight(each.name).shape))
            if item.rewrite.steps or item.activation is not None:
                hook = straight_through(item, self._device)
                self._hooks.enter_context(model.module.get_submodule(name).register_forward_pre_hook(hook))
        groups = [[one] for one in candidates] if self._alone else joined(candidates)
        rates, lr = self._row.by, self.options["lr"]
        members = [begin(group, lr or rates[group[0].tuning.name], self._device) for group in groups]
        return members + (self._vectors() if self.options["vectors"] else [])

    def _candidates(self, item: Solved) -> list[Candidate]:
        """``item``, where it can learn; else ``still`` says why not."""
        name, site = item.record["name"], self._model.site(item.record["name"])
        tuning = fitting(self._row, item.weight)
        if site.experts > 1 or isinstance(tuning, str):
            self.still[name] = tuning if isinstance(tuning, str) else "experts see only what is routed to them"
            return []
        floating = item.rewrite.weight(self._model.weight(name).float().cpu())
        weight, made = Solved(item.weight, item.record, item.rewrite, None, floating).unpacked()
        return [Candidate(Part(site.parameter, name, site.transposed, len(weight)), tuning, weight, made)]

    def _vectors(self) -> list[Member]:
        """Vectors that are stored in float, from the first block on."""
        found = []
        reached = tuple(f"{path}." for path in (*self._model.blocks, *self._model.after))
        for name, _ in self._model.kept:
            parameter = self._model.module.get_parameter(name)
            if parameter.ndim == 1 and name.startswith(reached):
                learner = FloatVector(parameter.detach(), self._run.plan.kept_dtype)
                descent = Descent(learner.start, learner.bounds, Adam(), self.options["lr"] or RATE)
                found.append(Member((Part(name, "", False, len(parameter)),), learner, descent))
        return found

    def _leaf(self, part: Part) -> nn.Parameter:
        leaf = nn.Parameter(self._model.module.get_parameter(part.parameter).detach().clone())
        place(self._model.module, part.parameter, leaf)
        return leaf

    def learn(self) -> Found:
        """All steps; what is kept."""
        iters, began = int(self.options["iters"]), time.monotonic()
        start = least = self.held_out()
        best: list[dict[str, Tensor]] | None = None
        losses: list[float] = []
        for step, (share, look) in enumerate(schedule(iters, LOOKS, self.options["warmup"]), 1):
            losses.append(self._step(share))
            told = ""
            if look:
                self._show([member.weight() for member in self._members])
                if (loss := self.held_out()) < least:
                    least, best = loss, [member.descent.copy() for member in self._members]
                told = f", {loss:.4f} on what is held out ({start:.4f} before)"
            every = max(1, iters // TOLD)
            if told or step % every == 0:
                told = f"step {step} of {iters}, loss {sum(losses[-every:]) / len(losses[-every:]):.4f}{told}"
            left = (time.monotonic() - began) / step * (iters - step)
            event = Event(
                "step", block=step, blocks=iters, eta_seconds=left, message=told, peak_rss_bytes=peak_rss_bytes()
            )
            self._run.progress(event)
        found = self._nothing(start) if best is None else self._frozen(best, start)
        self.close()
        return found

    def close(self) -> None:
        """Leave the model as it was, unloaded."""
        self._float.close()
        self._hooks.close()
        self._model.module.to("cpu")
        self._model.free("")
        give_back()

    def _frozen(self, best: Sequence[dict[str, Tensor]], start: float) -> Found:
        """``best`` as files hold it, if that loses less than the start."""
        layers: dict[str, T.Weight] = {}
        vectors: dict[str, Tensor] = {}
        decoded = []
        for member, values in zip(self._members, best, strict=True):
            if isinstance(member.learner, FloatVector):
                vectors[member.parts[0].parameter] = vector = member.learner.weight(values).cpu()
                decoded.append(vector)
                continue
            made = placed(member.learner.freeze(values), torch.device("cpu"))
            parts = [made] if len(member.parts) == 1 else unstack(made, member.rows)
            layers |= {part.layer: each for part, each in zip(member.parts, parts, strict=True)}
            decoded.append(torch.cat([each.dequantize() for each in parts]))
        self._show([weight.to(self._device) for weight in decoded])
        after = self.held_out()
        return Found(layers, vectors, start, after, self.still) if after < start else self._nothing(start)

    def _nothing(self, start: float) -> Found:
        """All stays as it is."""
        return Found({}, {}, start, start, self.still)

    def _step(self, share: float) -> float:
        """One step, at ``share`` of the first rate; the loss before it."""
        self._show(list(self._map(Member.weight, self._members)))
        loss, grads = self.gradients()

        def move(pair: tuple[Member, Tensor]) -> None:
            member, grad = pair
            member.descent.step(member.learner.gradient(member.descent.values, grad), share)

        for _ in self._map(move, zip(self._members, grads, strict=True)):
            pass
        return loss

    def _show(self, weights: Sequence[Tensor]) -> None:
        """Let the model go on with ``weights`` of the members."""
        for member, leaves, weight in zip(self._members, self._leaves, weights, strict=True):
            for part, leaf, rows in zip(member.parts, leaves, weight.split(member.rows), strict=True):
                leaf.data.copy_(rows.T if part.transposed else rows)

    def gradients(self) -> tuple[float, list[Tensor]]:
        """The loss of a batch, and its gradient by the weight of each member."""
        order = torch.randperm(len(self._learned_from), generator=self._generator)[: int(self.options["batch"])]
        some = map(self._begin, self._parts([self._learned_from[i] for i in order.tolist()]))
        losses, total = self._slopes(some, len(order)) if self._alone else self._recorded(list(some), len(order))
        parts = zip((part for member in self._members for part in member.parts), total, strict=True)
        lying = iter([grad.T if part.transposed else grad for part, grad in parts])
        return sum(map(float, losses)), [torch.cat([next(lying) for _ in member.parts]) for member in self._members]

    def _slopes(self, some: Iterable[_Windows], number: int) -> tuple[list[Tensor], list[Tensor]]:
        """The losses of ``some`` of ``number`` windows, each by its share, and their gradient by every leaf."""
        leaves = [leaf for each in self._leaves for leaf in each]
        losses, total = [], [torch.zeros_like(leaf) for leaf in leaves]

        def one(windows: _Windows) -> tuple[Tensor, Sequence[Tensor]]:
            with torch.enable_grad():
                with self._run.arithmetic(self._device.type):
                    logits = self._model.logits(self._through(windows.inputs, self._again)).float()
                lost = self._lost(logits, windows) * (len(windows.ids) / number)
                return lost.detach(), torch.autograd.grad(lost, leaves)

        for lost, found in self._map(one, some):
            losses.append(lost)
            for sum_, grad in zip(total, found, strict=True):
                sum_ += grad
        return losses, total

    def _recorded(self, some: list[_Windows], number: int) -> tuple[list[Tensor], list[Tensor]]:
        """As :meth:`_slopes`, recorded for what blocks are called with, which hardly ever depends on the windows."""
        calls = [each.inputs.calls for each in some]
        if [id(one) for one in calls] != [id(one) for one in self._calls]:
            self._calls = calls

            def function(parts: Iterable[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor]]:
                again = zip(parts, calls, strict=True)
                return self._slopes((_Windows(Inputs(hidden, call), *rest) for (hidden, *rest), call in again), number)

            self._step_of = Recorded(function, self._device)
        return self._step_of([(each.inputs.hidden, each.ids, each.floating) for each in some])

    def held_out(self) -> float:
        """The mean loss of the windows that are held out, products in float32."""

        def one(windows: _Windows) -> float:
            logits = self._model.logits(self._through(windows.inputs)).float()
            return float(self._lost(logits, windows, torch.float64)) * len(windows.ids)

        return float(sum(self._map(one, map(self._begin, self._parts(self._held))))) / len(self._held)

    def _parts(self, windows: Sequence[int]) -> list[list[int]]:
        """What goes through the model at once."""
        return [list(windows[i : i + self._together]) for i in range(0, len(windows), self._together)]

    def _begin(self, windows: list[int]) -> _Windows:
        ids = self._ids[windows].to(self._device)
        floating = torch.cat([self._float.read(window) for window in windows]).to(self._device)
        return _Windows(self._model.begin(ids), ids, floating)

    def _through(self, inputs: Inputs, again: bool = False) -> Tensor:
        """The last block's outputs for ``inputs``; ``again``: blocks keep nothing and run again on the way back."""
        hidden, run = inputs.hidden, self._model.run_block
        for index in range(len(self._model.blocks)):
            if again:
                options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                hidden = checkpoint(run, index, hidden, inputs, **options)
            else:
                hidden = run(index, hidden, inputs)
        return hidden

    def _lost(self, logits: Tensor, windows: _Windows, sums: torch.dtype = torch.float32) -> Tensor:
        """The loss of ``windows`` whose ``logits`` (windows, tokens, vocabulary) are these, means being taken in
        ``sums``."""
        with torch.no_grad():
            wanted = self._wanted(windows.floating)[:, :-1].float().log_softmax(-1)
        made = logits[:, :-1].log_softmax(-1)
        lost = (wanted.exp() * (wanted - made)).sum(-1).mean(dtype=sums)
        if self.options["label"]:
            ids = windows.ids[:, 1:]
            lost = lost + self.options["label"] * cross_entropy(logits[:, :-1].flatten(0, 1), ids.flatten())
        return lost
