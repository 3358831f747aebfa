# SPDX-License-Identifier: Apache-2.0
"""Layers to solve, solving them side by side, and going on with what came out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit import formats
from fewbit.core.correction import correction
from fewbit.core.facts import Facts, Need, strongest
from fewbit.measure.memory import peak_rss_bytes
from fewbit.model.sites import Site, in_block
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Rule
from fewbit.run.events import Event
from fewbit.run.facts import with_gradients
from fewbit.run.solve import Solved, Task, solve
from fewbit.run.state import Run


def needs(run: Run, index: int) -> dict[str, Need]:
    """What the rule of each site of block ``index`` asks of calibration, and its bias where it is to be corrected;
    sites that stay in float are left out."""
    return {
        site.name: strongest(
            run.plan.rules[site.name].needs,
            "mean_square" if run.asked.correct_bias and has_bias(run.model, site) else "nothing",
        )
        for site in block_sites(run, index)
        if site.name in run.plan.rules
    }


def has_bias(model: StreamedModel, site: Site) -> bool:
    """Whether something is added to the outputs of ``site`` that can be corrected."""
    return site.kind in ("linear", "conv1d") and (f"{site.name}.bias", "a bias") in model.kept


def make_task(run: Run, site: Site, facts: dict[str, list[Facts]], seen: dict[str, list[Tensor]]) -> Task | None:
    """What to solve for ``site``, or None when the plan leaves it alone."""
    rule = run.plan.rules.get(site.name)
    if rule is None:
        return None
    unseen = [torch.zeros(0, site.shape[1]) for _ in range(site.experts)]
    weight = run.model.weight(site.name).float().reshape(-1, site.shape[1])
    return Task(
        site,
        rule,
        formats.parse(rule.format),
        weight.clone() if rule.tunings() else weight,  # the model's own is overwritten once it is solved
        known_of(run, site, rule, facts),
        seen.get(site.name, unseen),
        run.asked.seed,
    )


def known_of(run: Run, site: Site, rule: Rule, facts: dict[str, list[Facts]]) -> list[Facts]:
    """What is known of ``site``, one entry an expert: from ``facts``, just collected, or from those kept on disk; and
    what is known of gradients where the method asks for it."""
    known = facts.get(site.name) or (run.kept.of(site) if run.kept is not None else None)
    known = known or [Facts.none(site.shape[1]) for _ in range(site.experts)]
    source = run.kept or run.sensitivity
    if rule.row().needs != "fisher" or source is None:
        return known
    return with_gradients(known, source, site)


def solve_all(run: Run, tasks: list[Task]) -> list[Solved]:
    """Solve ``tasks`` at once, in order, and tell of each."""
    solved = []
    for item in run.workers.map(solve, tasks):
        solved.append(item)
        record = item.record
        run.progress(
            Event(
                "layer",
                name=record["name"],
                error=record["relative_error"],
                bits=record["bits_per_weight"],
                seconds=record["seconds"],
                peak_rss_bytes=peak_rss_bytes(),
                message=record["note"],
            )
        )
    return solved


def solve_sites(
    run: Run, sites: list[Site], facts: dict[str, list[Facts]], seen: dict[str, list[Tensor]]
) -> list[Solved]:
    """:func:`solve_tasks` of what the plan has for ``sites``."""
    return solve_tasks(run, make_tasks(run, sites, facts, seen))


def make_tasks(run: Run, sites: list[Site], facts: dict[str, list[Facts]], seen: dict[str, list[Tensor]]) -> list[Task]:
    """What to solve for ``sites``, less those that the plan leaves alone."""
    return [task for site in sites if (task := make_task(run, site, facts, seen))]


def solve_tasks(run: Run, tasks: list[Task]) -> list[Solved]:
    """Solve ``tasks`` and put the decoded weights into the loaded model, and corrected biases where that is asked."""
    solved = solve_all(run, tasks)
    if run.asked.correct_bias:  # while the model still holds the float weights
        solved = [_corrected(run.model, task, item) for task, item in zip(tasks, solved, strict=True)]
    for item in solved:
        propagate(run.model, item)
    return solved


def _corrected(model: StreamedModel, task: Task, item: Solved) -> Solved:
    """``item``, the bias of its layer corrected, where it has one and tokens were seen."""
    known = task.facts[0]
    if not has_bias(model, task.site) or not known.tokens:
        return item
    quantized = item.rewrite.unweight(item.weight.dequantize())
    bias = model.module.get_parameter(f"{task.site.name}.bias")
    bias.add_(correction(task.weight, quantized, known.total.double() / known.tokens).to(bias.dtype))
    return replace(item, record={**item.record, "bias": "corrected"})


def block_sites(run: Run, index: int) -> list[Site]:
    return list(in_block(run.model.sites, index))


def propagate(model: StreamedModel, item: Solved | None, name: str = "") -> None:
    """Let the model go on with the decoded weights of ``item``; :func:`as_run` gives it the inputs they are for."""
    if item is not None:
        site = name or item.record["name"]
        model.set_weight(site, item.weight.dequantize().reshape(model.weight(site).shape))
