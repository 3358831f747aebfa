# SPDX-License-Identifier: Apache-2.0
"""The stages once more, with what the whole model learned in place of solving: written, checked, measured as before.

New shards lie beside the old ones until all are there. Then the journal takes the new records at once, and the shards
their places: a run killed at any instant finds either the old or the new.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from fewbit import formats
from fewbit.measure.memory import peak_rss_bytes
from fewbit.run.collect import drift, observe_probe, probe_through
from fewbit.run.events import Event
from fewbit.run.rewriting import as_run
from fewbit.run.solve import Solved, Task, relative_error, repacked
from fewbit.run.stages import check_ends, float_logits, load_tail, run_stages, tail_sites, write_stage
from fewbit.run.state import Run
from fewbit.run.tasks import block_sites, propagate
from fewbit.run.whole import Found, Whole, stored

PLACE = "learned"
"""Folder of new shards in ``state``."""


def run_all(run: Run) -> Run:
    """``run`` after every stage, and after what the whole model learns then."""
    run_stages(run)
    learn_whole(run)
    return run


def learn_whole(run: Run) -> None:
    """Let the model of ``run``, all stages being done, learn as a whole, if its recipe says so and it did not yet."""
    if (end := run.asked.recipe.end) is None:
        return
    if "end" not in run.journal.stages[-1]:
        began = time.monotonic()
        run.progress(Event("note", message=f"{end.name}: the float model once, then steps of the whole"))
        found = Whole(run).learn()
        told = f"{end.name}: {found.before:.4f} -> {found.after:.4f} on windows held out, "
        told += f"{len(found.layers)} layers and {len(found.vectors)} vectors learned, {len(found.still)} stand still"
        run.progress(
            Event("note", message=f"{told}, {time.monotonic() - began:.0f} s", peak_rss_bytes=peak_rss_bytes())
        )
        stages = _written(run, found) if found.layers or found.vectors else list(run.journal.stages)
        record = {"name": end.name, "before": found.before, "after": found.after, "still": found.still}
        seconds = round(stages[-1]["seconds"] + time.monotonic() - began, 3)
        stages[-1] = {**stages[-1], "end": record, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}
        run.journal.become(stages)
    _settle(run)


def _settle(run: Run) -> None:
    """Give new shards their places."""
    folder = run.state / PLACE
    for path in sorted(folder.glob("*.safetensors")):
        os.replace(path, run.folder / path.name)
    shutil.rmtree(folder, ignore_errors=True)


def _written(run: Run, found: Found) -> list[dict[str, Any]]:
    """Records of all stages, with ``found``; the shards that change are written anew."""
    model, folder = run.model, run.state / PLACE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    solved = {item.record["name"]: _learned(item, found) for item in stored(run)}
    with model.loaded(*model.before):
        floating = model.begin(run.texts.probe).hidden
        for site in model.sites:
            if site.kind == "embedding":
                propagate(model, solved.get(site.name))
        quantized = model.begin(run.texts.probe).hidden
    stages = run.journal.stages[:1]
    for stage in range(1, run.stages - 1):
        record, quantized, floating = _block(run, stage, solved, found, quantized, floating)
        stages.append(record)
    return [*stages, _tail(run, solved, found, quantized, floating)]


def _learned(item: Solved, found: Found) -> Solved:
    made = found.layers.get(item.record["name"])
    return item if made is None else repacked(item, made)


def _vectors(run: Run, found: Found, inside: str) -> None:
    """Those of ``found`` below the loaded module ``inside``."""
    for name, vector in found.vectors.items():
        if name.startswith(f"{inside}."):
            run.model.module.get_parameter(name).data.copy_(vector)


def _block(
    run: Run, stage: int, solved: dict[str, Solved], found: Found, quantized: Tensor, floating: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The record of the block of ``stage``, and the probe after it on both paths."""
    model, index = run.model, stage - 1
    name, before, sites = model.blocks[index], run.journal.stages[stage], block_sites(run, index)
    run.inputs("probe")
    model.load(name)
    floating = probe_through(run, index, floating)
    seen = observe_probe(run, index, quantized)
    items = [_measured(run, solved[site.name], seen) for site in sites if site.name in solved]
    for item in items:
        propagate(model, item)
    _vectors(run, found, name)
    with as_run(model, items):
        quantized = probe_through(run, index, quantized)
        record = write_stage(run, stage, sites, items, seen, run.state / PLACE)
    model.free(name)
    record["drift"] = drift(quantized, floating)
    return {**before, **record}, quantized, floating


def _measured(run: Run, item: Solved, seen: dict[str, list[Tensor]]) -> Solved:
    """``item`` with its error on what the probe shows; the loaded weight is in float yet."""
    name = item.record["name"]
    site, rule = run.model.site(name), run.plan.rules[name]
    weight = run.model.weight(name).float().reshape(-1, site.shape[1])
    task = Task(site, rule, formats.parse(rule.format), weight, [], seen[name], 0)
    error = relative_error(task, item.weight, item.rewrite)
    return replace(item, record={**item.record, "relative_error": error})


def _tail(run: Run, solved: dict[str, Solved], found: Found, quantized: Tensor, floating: Tensor) -> dict[str, Any]:
    """The record of the last stage."""
    model, before, sites = run.model, run.journal.stages[-1], tail_sites(run)
    load_tail(run)
    logits = float_logits(run, floating)
    items = [solved[site.name] for site in sites if site.name in solved]
    for item in items:
        propagate(model, item)
    for path in model.after:
        _vectors(run, found, path)
    record = write_stage(run, run.stages - 1, sites, items, {}, run.state / PLACE)
    record["check"] = check_ends(run, sites, items, quantized, logits)
    return {**before, **record}
