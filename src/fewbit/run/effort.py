# SPDX-License-Identifier: Apache-2.0
"""How long a run will take and how much memory, before it begins: from what each layer needs, and the speed of this
machine now."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from fewbit import formats
from fewbit.calibrate import Text
from fewbit.model.sites import Site
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe, Rule

BATCH_TOKENS = 2048
"""Tokens of the calibration that go through a block at once."""
CLUSTERED = 3e5
"""Operations that the best table of levels takes, a weight; as those of :attr:`fewbit.core.method.Method.work`."""


@dataclass(frozen=True)
class Time:
    """What a run takes: ``seconds`` whatever the machine multiplies, and ``operations`` of matrix products."""

    seconds: float
    operations: float

    def here(self) -> float:
        """Seconds on this machine, by a matrix product timed now."""
        return self.seconds + self.operations / _rate()


class Decided(Protocol):
    """A layer, and the rule that it is quantized by, or None."""

    @property
    def site(self) -> Site: ...
    @property
    def rule(self) -> Rule | None: ...
    @property
    def weights(self) -> int: ...


def estimate(
    decisions: Iterable[Decided], text: Text, calibrated: bool, model: StreamedModel, recipe: Recipe
) -> tuple[Time, int]:
    """Time and peak bytes, from the work that each layer needs."""
    decisions, tokens = list(decisions), text.samples * text.context if calibrated else 0
    flops, seconds, largest = 0.0, 3.0, 0
    blocks: dict[int | None, int] = {}
    gradients: dict[int | None, int] = {}
    for decision in decisions:
        rows, columns = decision.site.shape
        # fp32 weights, their quantized form and the solver's copies live together
        blocks[decision.site.block] = blocks.get(decision.site.block, 0) + 4 * decision.weights
        # a pass is 2 a weight and token; attention, activations and files take about as long again
        flops += 4 * tokens * rows * columns if decision.site.block is not None else 0
        if decision.rule is None:
            continue
        flops += _work(decision.rule) * decision.weights
        for tune in decision.rule.tunings():
            options = tune.settings
            # forward, backward for inputs and for the weight; attention and rounding take about as long again
            flops += 12 * options["iters"] * min(options["batch"], text.samples) * text.context * rows * columns
        for step in decision.rule.transforms:
            windows = min(step.settings.get("samples", 0), text.samples)
            # every power runs the module around the layer on them
            flops += 2 * len(step.row().tried(step.options)) * windows * text.context * rows * columns
        seconds += decision.weights * 6e-8
        if tokens and decision.rule.row().needs == "fisher":
            flops += 8 * tokens * rows * columns  # forward, again, and two products backward
            gradients[decision.site.block] = gradients.get(decision.site.block, 0) + 4 * decision.weights
        if decision.rule.needs == "gram":
            flops += decision.site.experts * (2 * tokens * columns**2 + 4 * columns**3 + rows * columns**2)
            seconds += columns * 2.5e-4
            largest = max(largest, decision.site.experts * 4 * columns**2)
    every = sum(decision.weights for decision in decisions)
    flops += _of_the_whole(recipe, text) * every
    base = 700 * 2**20  # python, torch and transformers themselves
    activations = 16 * BATCH_TOKENS * model.config.get_text_config().hidden_size * 8
    memory = base + int(2.5 * max(blocks.values())) + 4 * largest + activations
    # the sum of squares, and the gradients of a sequence a worker and one more
    memory += (2 + torch.get_num_threads()) * max(gradients.values(), default=0)
    if recipe.end is not None:
        memory += (3 + torch.get_num_threads()) * 4 * every  # the model, what is learned, and gradients a worker
    return Time(seconds, flops), memory


def _work(rule: Rule) -> float:
    """Operations a weight of choosing codes, beside the passes over the calibration."""
    clustered = formats.parse(rule.format).best_fit
    return rule.row().work + (CLUSTERED if clustered else 0.0)


def _of_the_whole(recipe: Recipe, text: Text) -> float:
    """Operations a weight of what the model learns as a whole, before its layers are quantized or after."""
    total = 0.0
    if recipe.end is not None:
        options = recipe.end.settings
        # forward, again, and two products backward, in a step; attention and the float model's head as long again
        total += 16 * options["iters"] * options["batch"] * text.context
    if recipe.model is not None and recipe.model.learns:
        options = recipe.model.settings
        # forward and two products backward, in a step; rotating and rounding all weights takes about a thousand
        total += options["steps"] * (12 * min(options["batch"], text.samples) * text.context + 1000)
    return total


def _rate() -> float:
    """Operations a second of matrix products on all threads: the best of some on one, as others may be at work, which
    threads that wait for one another feel most."""
    side, best, threads = 384, float("inf"), torch.get_num_threads()
    a = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    for _ in range(12):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(threads)
    return threads * 2 * side**3 / best
