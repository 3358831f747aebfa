# SPDX-License-Identifier: Apache-2.0
"""Transforms whose power is chosen by what rounding costs the module around their layers.

AWQ's search (Lin et al. 2023, arXiv:2306.00978): layers that share an input share one power. For each that is tried
they are rounded to nearest, each in its own format, put into the smallest module that is called with all of them in it
(the attention, the MLP), and that module runs on windows of the calibration as the quantized layers before it make
them. The power is kept whose outputs have the least mean squared error to those of the module as it is: what was
solved in it before is quantized, all else is in float. The first wins ties. A block that runs as a whole (a mixture of
experts) runs in float for that; its router is float always, so that tokens go where they ever do.

A power is tried from start to end by one worker, so that any number of threads gives the same bytes; a worker holds
the rounded weights of the group, and all of them what the module takes and gives for the windows, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from fewbit.core import format as F
from fewbit.model.replay import Call, Shared, noting_calls, shared_inputs
from fewbit.model.stream import with_replaced, with_weight
from fewbit.run.solve import Around, Task, transformed
from fewbit.run.state import Run

Found = Callable[[int], tuple[str, list[Call]]]
"""The module around a group of layers, by its path, and its calls for so many windows."""


def choose(run: Run, tasks: list[Task], same: str | None, around: Found) -> list[Task]:
    """``tasks`` of layers that share an input, with the powers that were chosen; their float weights are loaded.

    ``same``: a module whose output is that of the only layer among them, which then knows its error without running it.
    """
    chosen = list(tasks)
    asked = [_asked(task) for task in tasks]
    for ask in dict.fromkeys(filter(None, asked)):
        members = [place for place, own in enumerate(asked) if own == ask]
        powers, windows = ask
        if same is not None:
            best = Around(same)
        else:
            module, calls = around(windows)
            if not calls:  # an expert that no token came to
                continue
            lost = costs(run, [tasks[place] for place in members], powers, module, calls)
            best = Around(module, powers[lost.index(min(lost))])
        for place in members:
            chosen[place] = replace(tasks[place], around=best)
    return chosen


def choose_in_whole(run: Run, stage: int, index: int, tasks: list[Task], sample: Tensor) -> list[Task]:
    """As :func:`choose`, of a block that runs as a whole, all its ``tasks`` at once: every module is called with what
    the float block, which routes tokens as it ever does, makes of the calibration. ``sample`` is the probe before it.
    """
    if not any(map(_asked, tasks)):
        return tasks
    with run.arithmetic():
        groups = shared_inputs(run.model, index, sample[:1], run.inputs("sample"))
    by_name = {task.site.name: task for task in tasks}

    @cache
    def calls(windows: int) -> dict[str, list[Call]]:
        source, shared = run.hidden(stage - 1, "calibration"), run.inputs("calibration")
        with noting_calls(run.model, {group.module for group in groups if not group.same}) as noted:
            for batch in range(min(-(-windows // run.texts.batch), len(run.texts.batches))):
                with run.arithmetic():
                    run.model.run_block(index, source.read(batch), shared)
        source.close()
        return noted

    def around(group: Shared, windows: int) -> tuple[str, list[Call]]:
        return group.module, calls(windows)[group.module]

    for group in groups:
        members = [by_name[name] for name in group.names if name in by_name]
        chosen = choose(run, members, group.module if group.same else None, partial(around, group))
        by_name |= {task.site.name: task for task in chosen}
    return list(by_name.values())


def _asked(task: Task) -> tuple[tuple[float, ...], int] | None:
    """The powers to try for ``task``, and on how many windows."""
    for step in task.rule.transforms:
        if powers := step.row().tried(step.options):
            return powers, int(step.settings["samples"])
    return None


def costs(run: Run, tasks: Sequence[Task], powers: Sequence[float], path: str, calls: Sequence[Call]) -> list[float]:
    """Sum of the squared errors at the output of the module at ``path`` over ``calls``, for each of ``powers``."""
    module = run.model.module.get_submodule(path)

    def made(module: nn.Module, call: Call) -> Tensor:
        with run.arithmetic():
            out = module(*call[0], **call[1])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.float()

    wanted = list(run.workers.map(partial(made, module), calls))

    def cost(power: float) -> float:
        at = Around(path, power)
        parts = {task.site.name[len(path) + 1 :]: _rounded(run, replace(task, around=at)) for task in tasks}
        twin = with_replaced(module, parts)
        pairs = zip(calls, wanted, strict=True)
        return sum(float((made(twin, call) - want).square_().sum(dtype=torch.float64)) for call, want in pairs)

    return list(run.workers.map(cost, powers))


def _rounded(run: Run, task: Task) -> nn.Module:
    """The layer of ``task`` with what its weight, rewritten and rounded to nearest, is on inputs as they are."""
    site = task.site
    rewrite, weight, _ = transformed(task)
    values = rewrite.unweight(F.rounded(task.format, weight)).reshape(run.model.weight(site.name).shape)
    return with_weight(run.model.module.get_submodule(site.name), site, values)
