# SPDX-License-Identifier: Apache-2.0
"""The run itself: embedding, blocks in order, tail; each stage loads, solves, writes, checks, propagates, frees."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fewbit import formats
from fewbit.containers.safetensors import write_safetensors
from fewbit.core.facts import Facts
from fewbit.core.transform import seed_of
from fewbit.model.sites import Site, in_block
from fewbit.model.stream import StreamedModel
from fewbit.run.collect import collect, observe_probe, probe_through
from fewbit.run.compare import compare_logits
from fewbit.run.events import Event
from fewbit.run.rewriting import as_run
from fewbit.run.solve import Solved, Task, check_outputs, solve
from fewbit.run.state import Run, peak_rss
from fewbit.run.verify import read_back, read_rewrite


def run_stages(run: Run) -> None:
    """Do every stage that the journal does not have yet."""
    run.progress(Event("start", blocks=run.stages))
    done = len(run.journal.stages)
    if done:
        run.progress(Event("note", message=f"continuing after stage {done} of {run.stages}"))
    for stage in range(done, run.stages):
        began = time.monotonic()
        if stage == 0:
            record = embedding_stage(run)
        elif stage < run.stages - 1:
            record = block_stage(run, stage)
        else:
            record = tail_stage(run)
        record["seconds"] = round(time.monotonic() - began, 3)
        record["peak_rss_bytes"] = peak_rss()
        run.journal.finish(record)
        for old in (run.folder / "state").glob(f"*-{stage - 1:05d}.f32"):
            old.unlink()
        pace = (time.monotonic() - run.began) / (stage + 1 - done)
        run.progress(
            Event(
                "block",
                block=stage + 1,
                blocks=run.stages,
                peak_rss_bytes=peak_rss(),
                eta_seconds=pace * (run.stages - stage - 1),
            )
        )


def embedding_stage(run: Run) -> dict[str, Any]:
    """Quantize the embedding; start the activations of calibration and probe from it."""
    model = run.model
    for path in model.before:
        model.load(path)
    sites = [site for site in model.sites if site.block is None and site.kind == "embedding"]
    floating = model.begin(run.probe).hidden
    solved = _solve_all(run, [task for site in sites if (task := _task(run, site, {}, {}))])
    record = _write(run, 0, sites, solved, [])
    for item in solved:
        model.set_weight(item.record["name"], item.qtensor.dequantize())
    _store(run, 0, [model.begin(run.probe).hidden, floating], "probe")
    if run.calibration is not None:
        _store(run, 0, run.workers.map(lambda ids: model.begin(ids).hidden, run.batches()), "calibration")
    for path in model.before:
        model.free(path)
    return record


def block_stage(run: Run, stage: int) -> dict[str, Any]:
    """Quantize one block and propagate both streams through it."""
    model, index = run.model, stage - 1
    name = model.blocks[index]
    run.inputs("probe")  # needs the embedding for a moment, so before the block is loaded
    model.load(name)
    sites = list(in_block(model.sites, index))
    before = run.hidden(stage - 1, "probe")
    floating = probe_through(run, index, before.read(1))
    seen = observe_probe(run, index, before.read(0)[:1])
    facts = collect(run, stage, index)
    tasks = [task for site in sites if (task := _task(run, site, facts, seen))]
    solved = _solve_all(run, tasks)
    record = _write(run, stage, sites, solved, tasks)
    for item in solved:
        _propagate(model, item)
    with as_run(model, solved):
        quantized = probe_through(run, index, before.read(0))
        _pass_on(run, stage, index)
    before.close()
    _store(run, stage, [quantized, floating], "probe")
    model.free(name)
    record["drift"] = float((quantized - floating).norm() / floating.norm())
    return record


def _pass_on(run: Run, stage: int, index: int) -> None:
    """Take the calibration through the quantized block ``index``."""
    if run.calibration is None:
        return
    shared, calibration = run.inputs("calibration"), run.hidden(stage - 1, "calibration")

    def step(batch: int) -> Tensor:
        with run.arithmetic():
            return run.model.run_block(index, calibration.read(batch), shared)

    _store(run, stage, run.workers.map(step, range(len(run.batches()))), "calibration")
    calibration.close()


def tail_stage(run: Run) -> dict[str, Any]:
    """Quantize the head, write what is kept, and compare the two ends on the probe."""
    model = run.model
    for path in model.after:
        model.load(path)
    last = run.hidden(run.stages - 2, "probe")
    reference = (model.logits(hidden).float() for hidden in last.read(1).split(1))
    floating = [logits.half() for logits in reference]
    sites = [site for site in model.sites if site.block is None and site.kind != "embedding"]
    tasks = [task for site in sites if (task := _task(run, site, {}, {}))]
    solved = _solve_all(run, tasks)
    record = _write(run, run.stages - 1, sites, solved, tasks)
    for item in solved:
        _propagate(model, item)
    for site in sites:
        if site.tied_to is not None:
            _propagate(model, _embedding(run, site.tied_to), site.name)
    with as_run(model, solved):
        ours = (model.logits(hidden).float() for hidden in last.read(0).split(1))
        record["check"] = compare_logits(ours, floating, run.probe)
    last.close()
    return record


def _propagate(model: StreamedModel, item: Solved | None, name: str = "") -> None:
    """Let the model go on with the decoded weights of ``item``; :func:`as_run` gives it the inputs they are for."""
    if item is not None:
        site = name or item.record["name"]
        model.set_weight(site, item.qtensor.dequantize().reshape(model.weight(site).shape))


def _embedding(run: Run, name: str) -> Solved | None:
    """The embedding as solved in stage 0, read back, which a tied head runs on; None where it stays in float."""
    stage = run.journal.stages[0]
    found = [record for record in stage["layers"] if record["name"] == name]
    if not found:
        return None
    path = run.folder / stage["file"]
    return Solved(read_back(path, found[0]), found[0], read_rewrite(path, found[0]))


def _task(run: Run, site: Site, facts: dict[str, list[Facts]], seen: dict[str, list[Tensor]]) -> Task | None:
    """What to solve for ``site``, or None when the plan leaves it alone."""
    decision = next(decision for decision in run.plan.decisions if decision.site == site)
    if decision.rule is None:
        return None
    nothing = [Facts.none(site.shape[1]) for _ in range(site.experts)]
    unseen = [torch.zeros(0, site.shape[1]) for _ in range(site.experts)]
    return Task(
        site,
        decision.rule,
        formats.parse(decision.rule.format),
        run.model.weight(site.name).float().reshape(-1, site.shape[1]),
        facts.get(site.name, nothing),
        seen.get(site.name, unseen),
        seed_of(run.seed, site.name),
    )


def _solve_all(run: Run, tasks: list[Task]) -> list[Solved]:
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
                peak_rss_bytes=peak_rss(),
                message=record["note"],
            )
        )
    return solved


def _write(run: Run, stage: int, sites: list[Site], solved: list[Solved], tasks: list[Task]) -> dict[str, Any]:
    """Write the stage's shard and check it: read back from disk, decode, run the kernel, compare."""
    tensors = {f"{item.record['name']}.{key}": tensor for item in solved for key, tensor in item.arrays().items()}
    tensors |= _kept(run, stage, sites)
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))  # keeps all aligned
    path = run.folder / run.shard(stage)
    sha256 = write_safetensors(path, tensors, {"format": "pt"})
    seen = {task.site.name: task for task in tasks}
    for item in solved:
        again, rewrite = read_back(path, item.record), read_rewrite(path, item.record)
        task = seen.get(item.record["name"])
        if task is not None and task.site.experts == 1 and len(task.seen[0]):
            x = rewrite.apply(task.seen[0][:8])
            check_outputs(again, item.qtensor.dequantize(), x, item.record["name"])
    return {
        "stage": stage,
        "file": path.name,
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "tensors": {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()},
        "layers": [item.record for item in solved],
    }


def _kept(run: Run, stage: int, sites: list[Site]) -> dict[str, Tensor]:
    """Parameters of this stage that stay in float, in the dtype that the checkpoint's config names."""
    model, floating = run.model, {}
    if 0 < stage < run.stages - 1:
        prefix = model.blocks[stage - 1] + "."
        names = [name for name, _ in model.kept if name.startswith(prefix)]
    else:
        inside = tuple(block + "." for block in model.blocks)
        names = [name for name, _ in model.kept if not name.startswith(inside)] if stage else []
    skipped = {d.site for d in run.plan.decisions if d.rule is None and d.site.tied_to is None}
    names += [site.parameter for site in sites if site in skipped]
    for name in names:
        if model.module.get_parameter(name).is_meta:
            model.load(name.rpartition(".")[0])
        tensor = model.module.get_parameter(name).detach()
        floating[name] = tensor.to(run.plan.kept_dtype).contiguous()
    return floating


def _store(run: Run, stage: int, batches: Any, what: str) -> None:
    file = run.hidden(stage, what, create=True)
    for index, hidden in enumerate(batches):
        file.write(index, hidden)
    file.commit()
    file.close()
