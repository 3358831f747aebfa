# SPDX-License-Identifier: Apache-2.0
"""Rotations of a whole model learned on the calibration, before its layers are quantized.

The float model is in memory as a whole, once as it was read and once as it is rotated, with gradients of the latter: 12
bytes a weight, and as many again a thread. A step takes windows one by one, each on one thread, and adds up their
gradients in the order of the windows: the bytes that come out depend on no thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from fewbit import formats
from fewbit.containers.safetensors import open_safetensors, write_safetensors
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.rewrite import Chain
from fewbit.core.transform import seed_of
from fewbit.kernels.reference import round_activations
from fewbit.model.finite import finite
from fewbit.model.hooks import hooked
from fewbit.model.loading import place
from fewbit.model.skeleton import build
from fewbit.model.stream import StreamedModel
from fewbit.model.surgery import Preparation, Surgery
from fewbit.run.events import Event, Progress
from fewbit.run.planning import Decision
from fewbit.run.state import Run
from fewbit.run.workers import Workers
from fewbit.transforms.quarot import Turn
from fewbit.transforms.spinquant import cayley_step

TOLD = 10
"""Steps between two reports."""

Values = dict[str, Tensor]


def learned(run: Run, preparation: Preparation) -> Values:
    """The rotations of ``preparation`` learned on the calibration of ``run``, float64, by name; read from its folder
    where they are there already."""
    path, data = run.state / "rotations.safetensors", run.texts.calibration
    if path.is_file():
        file = open_safetensors(path)
        return {name: file.get(name) for name in file.entries}
    assert run.model.surgery is not None and data is not None
    learner = Learner(run.model, run.model.surgery, preparation, run.plan.decisions)
    found = learner.learn(data.ids, run.workers, run.progress)
    write_safetensors(path, dict(sorted(found.items())), {"format": "pt"})
    return found


class Learner:
    """One model on its way; ``values``: its parameters as the checkpoint has them, float32; ``original``: a module that
    has those."""

    def __init__(
        self, model: StreamedModel, surgery: Surgery, preparation: Preparation, decisions: Sequence[Decision]
    ) -> None:
        self.model, self.surgery, self.preparation = model, surgery, preparation
        self.values = {name: model.original(name).float() for name, _ in model.module.named_parameters()}
        self.original = build(model.config)
        for name, value in self.values.items():
            place(self.original, name, value)
        self.decisions = [d for d in decisions if d.rule is not None and d.site.kind in ("linear", "conv1d")]

    def learn(self, ids: Tensor, workers: Workers, tell: Progress) -> Values:
        """The rotations after all steps."""
        steps, batch = int(self.preparation.option("steps")), min(int(self.preparation.option("batch")), len(ids))
        found = {name: turn.apply(torch.eye(turn.width, dtype=torch.float64)) for name, turn in self.turns()}
        order = torch.Generator().manual_seed(seed_of(self.preparation.seed, self.preparation.name) >> 1)
        losses = []
        for step in range(steps):
            drawn = torch.randperm(len(ids), generator=order)[:batch]
            loss, gradients = self.gradients(found, ids[drawn], workers)
            rate = self.preparation.option("rate") * (1 - step / steps)
            found = {name: cayley_step(matrix, gradients[name], rate) for name, matrix in found.items()}
            losses.append(loss)
            if (step + 1) % TOLD == 0:
                mean = sum(losses[-TOLD:]) / TOLD
                tell(Event("note", message=f"rotations, step {step + 1} of {steps}: loss {mean:.4f}"))
        return found

    def turns(self) -> Iterator[tuple[str, Turn]]:
        """Those that are learned."""
        return iter(self.surgery.turns.items())

    def gradients(self, matrices: Values, ids: Tensor, workers: Workers) -> tuple[float, Values]:
        """The mean loss of windows ``ids`` (windows, tokens) and its gradient in each of ``matrices``."""
        with torch.enable_grad():
            leaves = {name: matrix.float().requires_grad_() for name, matrix in matrices.items()}
            fused = self.rotated({name: _turn(leaf) for name, leaf in leaves.items()})
            inputs = {name: nn.Parameter(value.detach()) for name, value in fused.items()}
        for name, value in inputs.items():
            place(self.model.module, name, value)
        loss, total = 0.0, {name: torch.zeros_like(value) for name, value in inputs.items()}
        with self.rounding():
            for one, found in workers.map(lambda window: self.window(list(inputs.values()), window), ids.split(1)):
                loss += one / len(ids)
                for name, gradient in zip(inputs, found, strict=True):
                    if gradient is not None:
                        total[name] += gradient / len(ids)
        moving = [name for name in inputs if fused[name].requires_grad]
        with torch.enable_grad():
            back = torch.autograd.grad([fused[n] for n in moving], list(leaves.values()), [total[n] for n in moving])
        return loss, dict(zip(leaves, back, strict=True))

    def rotated(self, turns: Mapping[str, Turn]) -> Values:
        """The parameters of the model rotated by ``turns``, weights that stand in for their inputs rounded."""
        fused = {
            name: change.of(value, turns, self.values.__getitem__)
            if (change := self.surgery.changes.get(name)) is not None
            else value
            for name, value in self.values.items()
        }
        for decision in self.decisions:
            assert decision.rule is not None
            if decision.rule.activation is None:
                name, format = decision.site.parameter, formats.parse(decision.rule.format)
                weight = fused[name].transpose(-1, -2) if decision.site.transposed else fused[name]
                rounded = through(weight, format, F.rounded(format, weight.detach()))
                fused[name] = rounded.transpose(-1, -2) if decision.site.transposed else rounded
        return fused

    def window(self, values: Sequence[Tensor], ids: Tensor) -> tuple[float, Sequence[Tensor | None]]:
        """The loss of ``ids`` (1, tokens) and its gradients in ``values``, the module's parameters."""
        with torch.enable_grad():
            logits = self._logits(self.model.module, ids)
            if self.preparation.option("kl"):
                with torch.no_grad():
                    target = self._logits(self.original, ids).log_softmax(-1)
                loss = kl_div(logits.log_softmax(-1)[0], target[0], reduction="batchmean", log_target=True)
            else:
                loss = cross_entropy(logits[0, :-1], ids[0, 1:])
            if not bool(loss.isfinite()):
                finite(loss, "", self.original, lambda module: self._logits(module, ids))
            return float(loss.detach()), torch.autograd.grad(loss, values, allow_unused=True)

    @staticmethod
    def _logits(module: nn.Module, ids: Tensor) -> Tensor:
        """(1, tokens, vocabulary)"""
        result: Tensor = module(input_ids=ids, use_cache=False).logits.float()
        return result

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """While open, layers see their inputs rounded as they will be, after the rotation that they then go through."""
        with hooked(
            self.model.module.get_submodule(decision.site.name).register_forward_pre_hook(self._inputs(decision))
            for decision in self.decisions
            if decision.rule is not None and decision.rule.activation is not None
        ):
            yield

    def _inputs(self, decision: Decision) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        rule, site = decision.rule, decision.site
        assert rule is not None and rule.input_format is not None
        format, steps = _known(rule.input_format), []
        for number, step in enumerate(rule.transforms):
            if (row := step.row()).needs == "nothing":
                shape = torch.empty(site.shape, device="meta")
                steps.append(row.fit(shape, None, seed_of(self.preparation.seed, site.name) ^ number))
        chain = Chain(tuple(steps))

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = chain.apply(arguments[0])
            inside = through(x, format, round_activations(x.detach(), format))
            return (chain.inverse(inside), *arguments[1:])

        return hook


def through(x: Tensor, format: Format, rounded: Tensor) -> Tensor:
    """``rounded``, which is ``x`` (..., columns) in ``format``, with a gradient: that of x, whose error grows as the
    range of its block does. With e the error and m the largest magnitude of a block, ``x + e m / m`` where e and the
    last m are constants."""
    flat = x.reshape(-1, x.shape[-1])
    error = B.split((rounded - x).detach().reshape(flat.shape), format.block)
    reach = B.split(flat, format.block).abs().amax(-1, keepdim=True)
    error = error * (reach / reach.detach().clamp_min(torch.finfo(x.dtype).tiny))
    return x + B.join(error, x.shape[-1]).reshape(x.shape)


def _known(format: Format) -> Format:
    """``format`` of inputs; for a grid that calibration fixes only once rotations are learned, the one of as many bits
    that every token finds for itself."""
    if not isinstance(format, formats.Fixed) or format.bound:
        return format
    return formats.parse(f"int{format.bits}/channel/{'sym' if format.symmetric else 'asym'}")


def _turn(matrix: Tensor) -> Turn:
    return Turn(len(matrix), lambda x: x @ matrix.to(x.dtype))
