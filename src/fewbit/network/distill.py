# SPDX-License-Identifier: Apache-2.0
"""What the layers of a network learn together, on its own output.

The network with quantized layers is compared with the float one on calibration batches. With y what is wanted and e
what is missing, tensor by tensor, and r the tuning's ``relative``, the loss is ``mean |e| / mean(|y|)^r``, whatever the
units of an output. 2DQuant (Liu et al. 2024, arXiv:2406.06649) adds the squared error of features that are divided by
their norms, five times; its code divides that by the number of their elements twice over, so that nothing of it is
left. Where it weighs as much as the output, images become worse (docs/measured/networks.md): it is left out.

Each tuning of the rules (:mod:`fewbit.core.tuning`) has its turn; the ends of static grids move with those of the
weights where it says so. As in :mod:`fewbit.run.reconstruct`, what is kept is what has the least loss on all batches,
before the first step, half-way or after the last.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import recipe
from fewbit.core.defaults import exact
from fewbit.core.descent import Descent, schedule
from fewbit.core.format import Format
from fewbit.core.rewrite import Chain
from fewbit.core.terms import matrices
from fewbit.core.transform import generator_of
from fewbit.core.tuning import Learnable, Values
from fewbit.kernels.reference import round_activations
from fewbit.network.ends import Ends
from fewbit.network.feeding import Batch, call
from fewbit.network.fold import tensors
from fewbit.network.solving import Asked, Solutions, by_operand
from fewbit.run.solve import retuned, turns

LOOKS = 2
"""How often the loss of all batches is taken on the way."""
KEPT = 1 << 28
"""Bytes of what is wanted that are kept from step to step; what is beyond is computed again."""
TINY = 1e-20
"""Least size that an error is divided by."""

State = dict[str, dict[str, Tensor]]
"""Values of learners by layer or operand, those of :class:`Ends` called ``input.low`` and ``input.high``."""


def distill(teacher: nn.Module, student: nn.Module, found: Solutions, asked: Asked) -> Solutions:
    """``found`` with what every tuning that is asked for, in order, learned; equal ones of several layers at once.

    Args:
        teacher: the float network, in float32: in 16 bits gradients would vanish.
        student: it, in whatever it runs in, with the biases that the quantized one will have.
    """
    rounded = by_operand(asked.products)  # which have nothing but a grid
    tunings = {name: item.tunings for name, item in found.solved.items()}
    tunings |= {name: rule.tunings() for name, rule in rounded.items()}
    for place, tune, asking in turns(tunings):
        if members := [name for name in asking if name in found.solved or tune.row().inputs]:
            phase = _Phase(teacher, student, found, rounded, members, tune)
            found = phase.done(asked.batches, generator_of(asked.seed, f"{place} {tune.name} {members[0]}"))
    return found


class _Phase:
    """One tuning of ``members`` of what is solved and ``rounded``, the others standing still."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        found: Solutions,
        rounded: Mapping[str, recipe.Rule],
        members: list[str],
        tune: recipe.Tune,
    ) -> None:
        self._teacher, self._student = teacher, copy.deepcopy(student).float().requires_grad_(False)
        self._solved, self._grids, self._members = found.solved, found.grids, members
        self._row = tune.row()
        options = tune.settings
        self._iters, self._batch, self._lr = int(options["iters"]), int(options["batch"]), float(options["lr"])
        self._relative = float(options["relative"])
        self._learners: dict[str, Learnable] = {
            name: self._row.learn(*self._solved[name].unpacked()) for name in members if name in self._solved
        }
        self._ends = {name: Ends(self._grids[name]) for name in members if self._row.inputs and name in self._grids}
        self._given: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept: dict[int, list[Tensor]] = {}
        self._room = KEPT
        for name, item in self._solved.items():
            self._place(name, item.weight.dequantize())
            self._round(name, item.rewrite, self._grids.get(name, item.activation))
        for name, rule in rounded.items():
            self._round(name, Chain(), self._grids.get(name, rule.input_format))

    def done(self, batches: list[Batch], order: torch.Generator) -> Solutions:
        """What was solved and the grids, ``members`` tuned."""
        start, least, best = self._learn(batches, order)
        outcome = f"loss {start:.4g} -> {least:.4g} by {self._row.name}"
        solved, grids = dict(self._solved), dict(self._grids)
        for name in self._members:
            own, ends = self._split({} if best is None else best[name])
            if name in solved:
                made = None if best is None else self._learners[name].freeze(own)
                solved[name] = retuned(solved[name], made, outcome)
            if ends:
                grids[name] = self._ends[name].freeze(*ends)
        return Solutions(solved, grids)

    def _learn(self, batches: list[Batch], order: torch.Generator) -> tuple[float, float, State | None]:
        """The loss before and after, and the best values; None where no step lowered it."""
        descents = {name: self._descent(name) for name in self._members}
        state = {name: each.values for name, each in descents.items()}
        start = least = self._total(state, batches)
        best: State | None = None
        for share, look in schedule(self._iters, LOOKS):
            drawn = torch.randperm(len(batches), generator=order)[: self._batch].tolist()
            for name, found in self._gradients(state, {i: batches[i] for i in drawn}).items():
                descents[name].step(found, share)
            if look and (loss := self._total(state, batches)) < least:
                least, best = loss, {name: each.copy() for name, each in descents.items()}
        return start, least, best

    def _descent(self, name: str) -> Descent:
        start: dict[str, Tensor] = {}
        bounds: dict[str, tuple[float, float]] = {}
        if learner := self._learners.get(name):
            start |= learner.start
            bounds |= learner.bounds
        if ends := self._ends.get(name):
            start |= {f"input.{end}": value for end, value in ends.start.items()}
            bounds |= {f"input.{end}": value for end, value in ends.bounds.items()}
        return Descent(start, bounds, self._row.descend(), self._lr or self._row.rate(self._iters, self._format(name)))

    def _format(self, name: str) -> Format:
        """Whose steps a member learns in."""
        return matrices(self._solved[name].weight)[0].format if name in self._solved else self._grids[name]

    @staticmethod
    def _split(values: Values) -> tuple[Values, tuple[Tensor, ...]]:
        """Of the weight, and of the inputs' ends (none, or two)."""
        own = {key: value for key, value in values.items() if not key.startswith("input.")}
        return own, tuple(values[f"input.{end}"] for end in ("low", "high") if f"input.{end}" in values)

    def _gradients(self, state: State, batches: dict[int, Batch]) -> State:
        """Of the mean loss of ``batches``, by their numbers, by every value."""
        weights = self._weights(state)
        with torch.enable_grad():
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            ends = {name: [v.detach().requires_grad_() for v in self._split(state[name])[1]] for name in state}
            self._set(leaves, ends)
            inputs = [*leaves.values(), *(end for pair in ends.values() for end in pair)]
            total = [torch.zeros_like(leaf) for leaf in inputs]
            for number, batch in batches.items():
                found = torch.autograd.grad(self._loss(number, batch) / len(batches), inputs, allow_unused=True)
                for sum_, grad in zip(total, found, strict=True):
                    if grad is not None:
                        sum_ += grad
        by_weight, by_end = dict(zip(leaves, total, strict=False)), iter(total[len(leaves) :])
        result: State = {}
        for name, own in state.items():
            learner = self._learners.get(name)
            result[name] = learner.gradient(self._split(own)[0], by_weight[name]) if learner else {}
            result[name] |= {f"input.{end}": next(by_end) for end in ("low", "high") if name in self._ends}
        return result

    def _weights(self, state: State) -> dict[str, Tensor]:
        return {name: learner.weight(self._split(state[name])[0]) for name, learner in self._learners.items()}

    @torch.no_grad()
    def _total(self, state: State, batches: list[Batch]) -> float:
        """The mean loss of all ``batches``."""
        self._set(self._weights(state), {name: self._split(own)[1] for name, own in state.items()})
        return sum(float(self._loss(number, batch)) for number, batch in enumerate(batches)) / len(batches)

    @torch.no_grad()
    def _wanted(self, number: int, batch: Batch) -> list[Tensor]:
        """What the float network makes of a batch."""
        if number in self._kept:
            return self._kept[number]
        wanted = tensors(call(self._teacher, batch))
        size = sum(part.nbytes for part in wanted)
        if size <= self._room:
            self._kept[number], self._room = wanted, self._room - size
        return wanted

    def _loss(self, number: int, batch: Batch) -> Tensor:
        wanted, found = self._wanted(number, batch), tensors(call(self._student, batch))
        pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(found, wanted, strict=True)]
        each = [(ours - y).abs().mean() / y.abs().mean().clamp_min(TINY) ** self._relative for ours, y in pairs]
        return torch.stack(each).mean()

    def _set(self, weights: Mapping[str, Tensor], ends: Mapping[str, Sequence[Tensor]]) -> None:
        for name, weight in weights.items():
            self._place(name, weight)
        self._given = {name: (pair[0], pair[1]) for name, pair in ends.items() if pair}

    def _place(self, name: str, weight: Tensor) -> None:
        """Give a layer of the student the matrix ``weight``, which may be part of a graph."""
        parameters = self._student.get_submodule(name)._parameters
        parameters["weight"] = weight.reshape(parameters["weight"].shape)  # type: ignore[assignment, union-attr]

    def _round(self, name: str, rewrite: Chain, grid: Format | None) -> None:
        """From now on inputs of a module of the student are rewritten and rounded as they will be, gradients going
        straight through."""

        @exact()
        def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = arguments[0] if arguments else named["input"]
            x = rewrite.apply(x) if rewrite.steps else x
            if name in self._given:
                x = self._ends[name].round(x, *self._given[name])
            elif grid is not None:
                x = x + (round_activations(x.detach(), grid) - x.detach())
            return (x,), {}

        self._student.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
