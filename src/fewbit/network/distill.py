# SPDX-License-Identifier: Apache-2.0
"""What the layers of a network learn together, on its own output and on those of its blocks.

The network with quantized layers is compared with the float one on calibration batches. With y what is wanted and e
what is missing, tensor by tensor, and r the tuning's ``relative``::

    loss = mean |e| / mean(|y|)^r   of the output   +   5 mean(e^2) / mean(y^2)^r   averaged over blocks

which is what 2DQuant minimises (Liu et al. 2024, arXiv:2406.06649: L1 of the images plus five times the squared error
of normalised features), whatever the units of an output. Blocks are the outermost modules of a class that occurs
several times and that hold a quantized layer. Each tuning of the rules (:mod:`fewbit.core.tuning`) has its turn; the
ends of static grids move with those of the weights where it says so. As in :mod:`fewbit.run.reconstruct`, what is kept
is what has the least loss on all batches, before the first step, half-way or after the last.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import formats, methods, recipe
from fewbit.core.descent import Rule
from fewbit.core.format import Format
from fewbit.core.rewrite import Chain
from fewbit.core.terms import matrices
from fewbit.core.transform import seed_of
from fewbit.core.tuning import Learnable, Values
from fewbit.formats.fixed import Fixed
from fewbit.kernels.reference import round_activations
from fewbit.model.hooks import hooked
from fewbit.network.ends import Ends
from fewbit.network.feeding import Batch, call
from fewbit.network.fold import tensors
from fewbit.run.solve import Solved, retuned

FEATURES = 5.0
"""Weight of the blocks' outputs beside that of the network."""
LOOKS = 2
"""How often the loss of all batches is taken on the way."""
KEPT = 1 << 28
"""Bytes of what is wanted that are kept from step to step; what is beyond is computed again."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Grids = dict[str, Fixed]
State = dict[str, dict[str, Tensor]]
"""Values of learners by layer or operand, those of :class:`Ends` called ``input.low`` and ``input.high``."""


def distill(
    teacher: nn.Module,
    student: nn.Module,
    solved: dict[str, Solved],
    rounded: Mapping[str, recipe.Rule],
    grids: Grids,
    batches: list[Batch],
    seed: int,
) -> tuple[dict[str, Solved], Grids]:
    """Every tuning that rules of ``solved`` and ``rounded`` ask for, in order; equal ones of several layers at once.

    Args:
        teacher: the float network.
        student: it, with the biases that the quantized one will have.
        solved: what stands for the weights, by layer.
        rounded: rules of operands of products, which have nothing but a grid.
        grids: of inputs, by layer or operand, where calibration fixed them.

    Returns:
        ``solved`` and ``grids`` with what was learned.
    """
    tunings = {name: item.tunings for name, item in solved.items()}
    tunings |= {name: rule.tunings() for name, rule in rounded.items()}
    for place in range(max(map(len, tunings.values()), default=0)):
        asked = {name: found[place] for name, found in tunings.items() if place < len(found)}
        asked = {name: tune for name, tune in asked.items() if name in solved or methods.tuning(tune.name).inputs}
        turns: list[tuple[recipe.Tune, list[str]]] = []
        for name, tune in asked.items():
            members = next((names for other, names in turns if other == tune), None)
            if members is None:
                turns.append((tune, [name]))
            else:
                members.append(name)
        for tune, members in turns:
            phase = _Phase(teacher, student, solved, rounded, grids, members, tune)
            solved, grids = phase.done(batches, seed_of(seed, f"{place} {tune.name} {members[0]}") & (2**63 - 1))
    return solved, grids


def blocks(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the outermost modules whose class, which is no container's, occurs several times in ``network``, and in
    which one of ``layers`` lies."""
    layers = list(layers)
    count = Counter(type(module) for module in network.modules())
    found: list[str] = []
    for name, module in network.named_modules():
        repeats = bool(name) and count[type(module)] > 1 and not isinstance(module, CONTAINERS)
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if repeats and not inside and any(layer.startswith(f"{name}.") for layer in layers):
            found.append(name)
    return found


class _Phase:
    """One tuning of ``members`` of ``solved`` and ``rounded``, the others standing still."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        solved: dict[str, Solved],
        rounded: Mapping[str, recipe.Rule],
        grids: Grids,
        members: list[str],
        tune: recipe.Tune,
    ) -> None:
        self._teacher, self._student = teacher, copy.deepcopy(student).requires_grad_(False)
        self._solved, self._grids, self._members = solved, grids, members
        self._row = methods.tuning(tune.name)
        options = {**self._row.options, **tune.options}
        self._iters, self._batch, self._lr = int(options["iters"]), int(options["batch"]), float(options["lr"])
        self._relative = float(options["relative"])
        self._blocks = blocks(teacher, solved)
        self._learners: dict[str, Learnable] = {
            name: self._row.learn(*solved[name].unpacked()) for name in members if name in solved
        }
        self._ends = {name: Ends(grids[name]) for name in members if self._row.inputs and name in grids}
        self._given: dict[str, tuple[Tensor, Tensor]] = {}
        self._kept: dict[int, list[list[Tensor]]] = {}
        self._room = KEPT
        for name, item in solved.items():
            self._place(name, item.weight.dequantize())
            self._round(name, item.rewrite, grids.get(name, item.activation))
        for name, rule in rounded.items():
            self._round(name, Chain(), grids.get(name, formats.parse(str(rule.activation))))

    def done(self, batches: list[Batch], seed: int) -> tuple[dict[str, Solved], Grids]:
        """What was solved and the grids, ``members`` tuned."""
        start, least, best = self._learn(batches, torch.Generator().manual_seed(seed))
        outcome = f"loss {start:.4g} -> {least:.4g} by {self._row.name}"
        solved, grids = dict(self._solved), dict(self._grids)
        for name in self._members:
            own, ends = self._split({} if best is None else best[name])
            if name in solved:
                made = None if best is None else self._learners[name].freeze(own)
                solved[name] = retuned(solved[name], made, outcome)
            if ends:
                grids[name] = self._ends[name].freeze(*ends)
        return solved, grids

    def _learn(self, batches: list[Batch], order: torch.Generator) -> tuple[float, float, State | None]:
        """The loss before and after, and the best values; None where no step lowered it."""
        state, bounds = self._start()
        rules: dict[str, Rule] = {name: self._row.descend() for name in self._members}
        rates = {name: self._lr or self._row.rate(self._iters, self._format(name)) for name in self._members}
        start = least = self._total(state, batches)
        best: State | None = None
        looks = {self._iters * look // LOOKS for look in range(1, LOOKS + 1)}
        for step in range(1, self._iters + 1):
            drawn = torch.randperm(len(batches), generator=order)[: self._batch].tolist()
            share = 1 - (step - 1) / self._iters
            for name, found in self._gradients(state, {i: batches[i] for i in drawn}).items():
                for key, grad in found.items():
                    rules[name].step(key, state[name][key], grad, rates[name] * share)
                    state[name][key].clamp_(*bounds[name][key])
            if step in looks and (loss := self._total(state, batches)) < least:
                least, best = loss, {name: {k: v.clone() for k, v in own.items()} for name, own in state.items()}
        return start, least, best

    def _start(self) -> tuple[State, dict[str, dict[str, tuple[float, float]]]]:
        state: State = {}
        bounds: dict[str, dict[str, tuple[float, float]]] = {}
        for name in self._members:
            state[name], bounds[name] = {}, {}
            if name in self._learners:
                state[name] |= {key: value.clone() for key, value in self._learners[name].start.items()}
                bounds[name] |= self._learners[name].bounds
            if name in self._ends:
                ends = self._ends[name]
                state[name] |= {f"input.{end}": value.clone() for end, value in ends.start.items()}
                bounds[name] |= {f"input.{end}": value for end, value in ends.bounds.items()}
        return state, bounds

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
    def _wanted(self, number: int, batch: Batch) -> list[list[Tensor]]:
        """What the blocks of the float network make of a batch, and what it makes of it itself."""
        if number in self._kept:
            return self._kept[number]
        with _outputs(self._teacher, self._blocks) as wanted:
            wanted.append(tensors(call(self._teacher, batch)))
        size = sum(part.nbytes for parts in wanted for part in parts)
        if size <= self._room:
            self._kept[number], self._room = wanted, self._room - size
        return wanted

    def _loss(self, number: int, batch: Batch) -> Tensor:
        wanted = self._wanted(number, batch)
        with _outputs(self._student, self._blocks) as found:
            found.append(tensors(call(self._student, batch)))
        *features, last = (
            [(ours.float() - theirs.float(), theirs.float()) for ours, theirs in zip(*pair, strict=True)]
            for pair in zip(found, wanted, strict=True)
        )
        loss = _mean([_relative(e.abs().mean(), y.abs().mean(), self._relative) for e, y in last])
        each = [_relative(e.square().mean(), y.square().mean(), self._relative) for pairs in features for e, y in pairs]
        return loss + FEATURES * _mean(each) if each else loss

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

        def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            x = arguments[0] if arguments else named["input"]
            x = rewrite.apply(x) if rewrite.steps else x
            if name in self._given:
                x = self._ends[name].round(x, *self._given[name])
            elif grid is not None:
                x = x + (round_activations(x.detach(), grid) - x.detach())
            return (x,), {}

        self._student.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _relative(error: Tensor, size: Tensor, power: float) -> Tensor:
    return error / size.clamp_min(1e-20) ** power


@contextmanager
def _outputs(network: nn.Module, names: Iterable[str]) -> Iterator[list[list[Tensor]]]:
    """While open, what the modules ``names`` return, call by call in the order in which they run."""
    found: list[list[Tensor]] = []
    with hooked(
        network.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(tensors(output)))
        for name in names
    ):
        yield found
