# SPDX-License-Identifier: Apache-2.0
"""The run itself: embedding, blocks in order, tail; each stage loads, solves, writes, checks, propagates, frees."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.calibrate import Calibration
from fewbit.containers.safetensors import write_safetensors
from fewbit.core.facts import Facts
from fewbit.model.sites import Site, in_block
from fewbit.model.stream import Inputs, StreamedModel
from fewbit.run.events import Event, Progress
from fewbit.run.hidden import HiddenFile
from fewbit.run.journal import Journal
from fewbit.run.observe import Observer
from fewbit.run.planning import Plan
from fewbit.run.rounding import rounded
from fewbit.run.solve import SHOWN, Solved, Task, check_outputs, solve
from fewbit.run.verify import read_back
from fewbit.run.workers import Workers


@dataclass
class Run:
    """Everything a stage needs. ``probe`` (windows, tokens) is held-out text that the run checks itself on."""

    model: StreamedModel
    plan: Plan
    folder: Path
    journal: Journal
    calibration: Calibration | None
    batch: int
    probe: Tensor
    workers: Workers
    progress: Progress
    calibration_dtype: torch.dtype
    began: float = field(default_factory=time.monotonic)
    calls: dict[str, Inputs] = field(default_factory=dict)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """What calibration computes in: matrix products in ``calibration_dtype``, sums and facts in float32."""
        return torch.autocast("cpu", self.calibration_dtype, enabled=self.calibration_dtype != torch.float32)

    def inputs(self, what: str) -> Inputs:
        """What blocks are called with for a batch of "probe" or "calibration"; equal for all batches of a kind."""
        if what not in self.calls:
            for path in self.model.before:
                self.model.load(path)
            ids = {"probe": self.probe[:1], "calibration": (self.batches() or [self.probe])[0]}
            empty = torch.zeros(0)
            self.calls = {key: replace(self.model.begin(value), hidden=empty) for key, value in ids.items()}
            for path in self.model.before:
                self.model.free(path)
        return self.calls[what]

    @property
    def stages(self) -> int:
        return len(self.model.blocks) + 2

    def shard(self, stage: int) -> str:
        return f"model-{stage + 1:05d}-of-{self.stages:05d}.safetensors"

    def batches(self) -> list[Tensor]:
        return [] if self.calibration is None else list(self.calibration.ids.split(self.batch))

    def hidden(self, stage: int, what: str, create: bool = False) -> HiddenFile:
        """Activations after ``stage``; the probe's file holds (quantized path, float path)."""
        width = self.model.config.get_text_config().hidden_size
        if what == "probe":
            shape = (2, *self.probe.shape, width)
        else:
            ids = self.batches()
            shape = (len(ids), *ids[0].shape, width)
        return HiddenFile(self.folder / "state" / f"{what}-{stage:05d}.f32", shape, create)


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


def peak_rss() -> int:
    """Peak resident bytes of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    floating = _probe_through(run, index, before.read(1))
    seen = _observe_probe(run, index, before.read(0)[:1])
    facts = _collect(run, stage, index)
    tasks = [task for site in sites if (task := _task(run, site, facts, seen))]
    solved = _solve_all(run, tasks)
    record = _write(run, stage, sites, solved, tasks)
    for item in solved:
        _propagate(model, item)
    with rounded(model, run.plan, index):
        quantized = _probe_through(run, index, before.read(0))
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
    ours = (model.logits(hidden).float() for hidden in last.read(0).split(1))
    record["check"] = compare_logits(ours, floating, run.probe)
    last.close()
    return record


def _propagate(model: StreamedModel, item: Solved | None, name: str = "") -> None:
    """Let the model go on with the decoded weights of ``item``."""
    if item is not None:
        site = name or item.record["name"]
        model.set_weight(site, item.qtensor.dequantize().reshape(model.weight(site).shape))


def _embedding(run: Run, name: str) -> Solved | None:
    """The embedding as solved in stage 0, read back, which a tied head runs on; None where it stays in float."""
    stage = run.journal.stages[0]
    found = [record for record in stage["layers"] if record["name"] == name]
    return Solved(read_back(run.folder / stage["file"], found[0]), found[0]) if found else None


def compare_logits(ours: Iterator[Tensor], reference: Iterable[Tensor], ids: Tensor) -> dict[str, Any]:
    """Perplexity of both, mean KL(reference || ours) in nats, and top-1 agreement, over the probe's next tokens.

    ``ours`` and ``reference``: logits (1, tokens, vocabulary), one entry a window of ``ids``.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for mine, theirs, row in zip(ours, reference, ids, strict=True):
        for part in torch.arange(len(row) - 1).split(64):  # bounds the copies of (tokens, vocabulary)
            p, q = theirs[0, part].float().log_softmax(-1), mine[0, part].float().log_softmax(-1)
            target = row[part + 1].unsqueeze(1)
            kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
            same = (p.argmax(-1) == q.argmax(-1)).sum()
            sums += torch.stack([-p.gather(1, target).sum(), -q.gather(1, target).sum(), kl, same])
            count += len(part)
    mean = sums / count
    return {
        "perplexity": float(mean[1].exp()),
        "reference_perplexity": float(mean[0].exp()),
        "kl_mean": float(mean[2]),
        "top1_agreement": float(mean[3]),
        "tokens": count,
    }


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
    )


def _probe_through(run: Run, index: int, hidden: Tensor) -> Tensor:
    """Block ``index`` applied to the probe's windows (windows, tokens, width), a window a worker."""
    inputs = run.inputs("probe")
    return torch.cat(list(run.workers.map(lambda h: run.model.run_block(index, h, inputs), hidden.split(1))))


def _observe_probe(run: Run, index: int, hidden: Tensor) -> dict[str, list[Tensor]]:
    """The first inputs that each site (and expert) of block ``index`` sees on the quantized path."""
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, x: Tensor, expert: int | None) -> None:
        seen.setdefault((site, expert or 0), x.reshape(-1, x.shape[-1])[:SHOWN].float().clone())

    with run.model.observe(index, keep):
        run.model.run_block(index, hidden, run.inputs("probe"))
    return {
        site.name: [seen.get((site.name, expert), torch.zeros(0, site.shape[1])) for expert in range(site.experts)]
        for site in in_block(run.model.sites, index)
    }


def _collect(run: Run, stage: int, index: int) -> dict[str, list[Facts]]:
    """Facts of every site of block ``index`` over the calibration, merged in the order of the batches."""
    needs = {
        decision.site.name: methods.named(decision.rule.method).needs
        for decision in run.plan.decisions
        if decision.site.block == index and decision.rule is not None
    }
    if run.calibration is None or not set(needs.values()) - {"nothing"}:
        return {}
    routed = any(site.kind == "experts" for site in in_block(run.model.sites, index))
    observer = Observer({name for name, need in needs.items() if need == "gram"}, 0 if routed else len(needs))
    source, shared = run.hidden(stage - 1, "calibration"), run.inputs("calibration")

    def step(batch: int) -> dict[tuple[str, int], Facts]:
        with observer.batch() as found, run.arithmetic():
            run.model.run_block(index, source.read(batch), shared)
        return found

    with run.model.observe(index, observer, set(needs)):
        for found in run.workers.map(step, range(len(run.batches()))):
            observer.merge(found)
    source.close()
    return {
        site.name: [observer.facts(site.name, expert, site.shape[1]) for expert in range(site.experts)]
        for site in in_block(run.model.sites, index)
    }


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
    tensors = {
        f"{item.record['name']}.weight_{array}": tensor
        for item in solved
        for array, tensor in {"packed": item.qtensor.packed, **item.qtensor.params}.items()
    }
    tensors |= _kept(run, stage, sites)
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))  # keeps all aligned
    path = run.folder / run.shard(stage)
    sha256 = write_safetensors(path, tensors, {"format": "pt"})
    seen = {task.site.name: task for task in tasks}
    for item in solved:
        again = read_back(path, item.record)
        task = seen.get(item.record["name"])
        if task is not None and task.site.experts == 1 and len(task.seen[0]):
            decoded = item.qtensor.dequantize()
            check_outputs(again, decoded, task.seen[0][:8], item.record["name"], task.activation)
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
