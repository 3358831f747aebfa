# SPDX-License-Identifier: Apache-2.0
"""The run itself: embedding, blocks in order, tail; each stage loads, solves, writes, checks, propagates, frees."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.containers.safetensors import write_safetensors
from fewbit.core.room import converted
from fewbit.measure.memory import peak_rss_bytes
from fewbit.memory import give_back
from fewbit.model.sites import Site
from fewbit.run.collect import drift, observe_probe, probe_started, probe_through
from fewbit.run.compare import compare_logits, summary
from fewbit.run.events import Event
from fewbit.run.reconstruct import tuned
from fewbit.run.rewriting import as_run
from fewbit.run.sequential import quantize_block
from fewbit.run.solve import Solved, check_outputs
from fewbit.run.state import HELD, TOGETHER, Run
from fewbit.run.tasks import block_sites, propagate, solve_sites
from fewbit.run.verify import opened, read_back, read_first, read_rewrite


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
        record["peak_rss_bytes"] = peak_rss_bytes()
        run.journal.finish(record)
        give_back()
        for old in run.state.glob(f"*-{stage - 1:05d}.f32"):
            old.unlink()
        pace = (time.monotonic() - run.began) / (stage + 1 - done)
        run.progress(
            Event(
                "block",
                block=stage + 1,
                blocks=run.stages,
                peak_rss_bytes=peak_rss_bytes(),
                eta_seconds=pace * (run.stages - stage - 1),
            )
        )


def embedding_stage(run: Run) -> dict[str, Any]:
    """Quantize the embedding; start the activations of calibration and probe from it."""
    model, kept = run.model, _kept_loaded(run)
    for name in kept:
        model.load(name)
    with model.loaded(*(name for name in model.before if name not in kept)):
        sites = [site for site in model.sites if site.block is None and site.kind == "embedding"]
        floating = model.begin(run.texts.probe).hidden
        if tuned(run):
            _store(run, 0, run.workers.map(lambda ids: model.begin(ids).hidden, run.texts.batches), "reference")
        solved = solve_sites(run, sites, {}, {})
        record = write_stage(run, 0, sites, solved, {})
        _store(run, 0, [model.begin(run.texts.probe).hidden, floating], "probe")
        if run.texts.calibration is not None:
            _store(run, 0, run.workers.map(lambda ids: model.begin(ids).hidden, run.texts.batches), "calibration")
        run.note_inputs()
    return record


def _kept_loaded(run: Run) -> set[str]:
    """Embeddings that stay in memory for the head that is tied to them, which would read them again: small ones that
    stay in float."""
    tied = {site.tied_to for site in run.model.sites}
    return {
        site.name
        for site in run.model.sites
        if site.name in tied.difference(run.plan.rules) and 4 * math.prod(site.shape) <= HELD
    }


def block_stage(run: Run, stage: int) -> dict[str, Any]:
    """Quantize one block and propagate both streams through it."""
    model, index = run.model, stage - 1
    name = model.blocks[index]
    run.inputs("probe")  # needs the embedding for a moment, so before the block is loaded
    model.load(name)
    sites = block_sites(run, index)
    before = run.hidden(stage - 1, "probe")
    floating = probe_through(run, index, before.read(1))
    sample = before.read(0)
    seen = observe_probe(run, index, sample)
    solved, order, passed_on = quantize_block(run, stage, index, sample, seen)
    flushed = run.workers.start(lambda: None if passed_on is None else passed_on.commit())
    with as_run(model, solved):
        quantized_when_ready = probe_started(run, index, before.read(0))
        record = write_stage(run, stage, sites, solved, seen)
        quantized = quantized_when_ready()
    before.close()
    _store(run, stage, [quantized, floating], "probe")
    model.free(name)
    flushed.result()
    record["order"] = order
    record["drift"] = drift(quantized, floating)
    return record


def tail_stage(run: Run) -> dict[str, Any]:
    """Quantize the head, write what is kept, and compare the two ends on the probe."""
    load_tail(run)
    last = run.hidden(run.stages - 2, "probe")
    floating = float_logits(run, last.read(1))
    sites = tail_sites(run)
    solved = solve_sites(run, sites, {}, {})
    record = write_stage(run, run.stages - 1, sites, solved, {})
    record["check"] = check_ends(run, sites, solved, last.read(0), floating)
    last.close()
    return record


def tail_sites(run: Run) -> list[Site]:
    """What the last stage solves: the head, and what is quantized of what a vision-language model sees with."""
    return [site for site in run.model.sites if site.block is None and site.kind != "embedding"]


def load_tail(run: Run) -> None:
    """Make real what the last stage solves."""
    for path in [*run.model.after, *(site.name for site in tail_sites(run) if site.name in run.plan.rules)]:
        run.model.load(path)


def float_logits(run: Run, hidden: Tensor) -> list[Tensor]:
    """Logits that the check compares, of the float path's ``hidden`` (windows, tokens, width), float16; ``after`` is
    loaded, and in float yet."""
    return list(run.workers.map(lambda part: run.model.logits(part).half(), scored(hidden[:, :-1])))


def scored(tokens: Tensor) -> list[Tensor]:
    """What the check compares of ``tokens`` (windows, tokens, ...), some windows each: every second token, the odd ones
    of one window and the even ones of the next. Neighbours tell much the same, and most of the check is logits."""
    return [*tokens[::2, ::2].split(TOGETHER), *tokens[1::2, 1::2].split(TOGETHER)]


def check_ends(
    run: Run, sites: list[Site], solved: list[Solved], hidden: Tensor, floating: list[Tensor]
) -> dict[str, Any]:
    """The two ends compared on the probe: logits of the quantized path's ``hidden`` and those of the float path."""
    for site in sites:
        if site.tied_to is not None:
            propagate(run.model, _embedding(run, site.tied_to), site.name)
    with as_run(run.model, solved):
        triples = zip(scored(hidden[:, :-1]), floating, scored(run.texts.probe[:, 1:]), strict=True)
        logits = run.model.logits
        found = summary(run.workers.map(lambda one: compare_logits(logits(one[0]).float(), one[1], one[2]), triples))
    return {**found, "windows": len(run.texts.probe), "context": run.texts.probe.shape[1]}


def _embedding(run: Run, name: str) -> Solved | None:
    """The embedding as solved in stage 0, read back, which a tied head runs on; None where it stays in float."""
    stage = run.journal.stages[0]
    found = [record for record in stage["layers"] if record["name"] == name]
    if not found:
        return None
    path = run.folder / stage["file"]
    return Solved(read_back(path, found[0]), found[0], read_rewrite(path, found[0]))


def write_stage(
    run: Run,
    stage: int,
    sites: list[Site],
    solved: list[Solved],
    seen: dict[str, list[Tensor]],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Write the stage's shard and check it: read back from disk, decode, run the kernel, compare. ``folder``: elsewhere
    than in the run's."""
    tensors = {f"{item.record['name']}.{key}": tensor for item in solved for key, tensor in item.arrays().items()}
    tensors |= _kept(run, stage, sites)
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))  # keeps all aligned
    path = (folder or run.folder) / run.shard(stage)
    sha256 = write_safetensors(path, tensors, {"format": "pt"})
    stored = opened(path)

    def checked(item: Solved) -> dict[str, Any]:
        name = item.record["name"]
        solved = run.model.weight(name)  # the model holds it: the block goes on with it
        again, decoded_sha256 = read_first(stored, item.record, solved)
        rewrite, shown = read_rewrite(stored, item.record), seen.get(name, [])
        if len(shown) == 1 and len(shown[0]):
            x = rewrite.apply(shown[0][:8])
            check_outputs(again, solved, x, name, item.activation, item.integers)
        return {**item.record, "decoded_sha256": decoded_sha256}

    layers = list(run.workers.map(checked, solved))
    return {
        "stage": stage,
        "file": path.name,
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
        "layers": layers,
    }


def _kept(run: Run, stage: int, sites: list[Site]) -> dict[str, Tensor]:
    """Parameters of this stage that stay in float, in the plan's dtype for them."""
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
            model.load(name)
        tensor = model.module.get_parameter(name).detach()
        floating[name] = converted(tensor, run.plan.kept_dtype).contiguous()
    return floating


def _store(run: Run, stage: int, batches: Any, what: str) -> None:
    file = run.hidden(stage, what, create=True)
    for index, hidden in enumerate(batches):
        file.write(index, hidden)
    file.commit()
