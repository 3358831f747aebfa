# SPDX-License-Identifier: Apache-2.0
"""What a block is fed: facts of its sites over the calibration, and what the probe shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.model.sites import in_block
from fewbit.run.hidden import HiddenFile
from fewbit.run.observe import Observer
from fewbit.run.rewriting import as_run, lying_on, placed
from fewbit.run.solve import Solved
from fewbit.run.state import SHOWN, TOGETHER, Run
from fewbit.run.tasks import needs


def probe_through(run: Run, index: int, hidden: Tensor) -> Tensor:
    """Block ``index`` applied to the probe's windows (windows, tokens, width), some windows a worker."""
    return probe_started(run, index, hidden)()


def probe_started(run: Run, index: int, hidden: Tensor) -> Callable[[], Tensor]:
    """:func:`probe_through`, begun while the caller does something else; what is returned waits for the result."""
    inputs = run.inputs("probe")
    begun = [run.workers.start(partial(run.model.run_finite, index, part, inputs)) for part in hidden.split(TOGETHER)]
    return lambda: torch.cat([part.result() for part in begun])


def drift(quantized: Tensor, floating: Tensor) -> float:
    """What the ``quantized`` path's activations lie from the ``floating`` ones, relative to these."""
    return float((quantized.double() - floating).norm() / floating.double().norm())


def calibration_through(
    run: Run, stage: int, index: int, before: str, after: str, solved: Sequence[Solved] = ()
) -> HiddenFile:
    """Take what ``before`` holds of the calibration through block ``index``, on the device of the run, inputs of the
    ``solved`` layers as they see them: what it makes of it, as ``after``, to be committed."""
    source, target = run.hidden(stage - 1, before), run.hidden(stage, after, create=True)
    device, model = torch.device(run.asked.device), run.model
    inputs = run.inputs("calibration")
    shared = replace(inputs, calls=placed(inputs.calls, device))

    def one(batch: int) -> None:
        with run.arithmetic(device.type):
            target.write(batch, model.run_finite(index, source.read(batch).to(device), shared))

    with lying_on(device, model.module.get_submodule(model.blocks[index])), as_run(model, solved, device):
        for _ in run.workers.map(one, range(len(run.texts.batches))):
            pass
    source.close()
    return target


def observe_probe(run: Run, index: int, hidden: Tensor) -> dict[str, list[Tensor]]:
    """The first inputs that each site (and expert) of block ``index`` sees of the probe's windows ``hidden``."""
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(site: str, x: Tensor, expert: int | None) -> None:
        seen.setdefault((site, expert or 0), x.reshape(-1, x.shape[-1])[:SHOWN].float().clone())

    with run.model.observe(index, keep):
        run.model.run_block(index, hidden[: run.shown], run.inputs("shown"))
    return {
        site.name: [seen.get((site.name, expert), torch.zeros(0, site.shape[1])) for expert in range(site.experts)]
        for site in in_block(run.model.sites, index)
    }


def collect(run: Run, stage: int, index: int) -> dict[str, list[Facts]]:
    """Facts of every site of block ``index`` over the calibration, merged in the order of the batches."""
    asked = needs(run, index)
    if run.texts.calibration is None or not set(asked.values()) - {"nothing"}:
        return {}
    routed = any(site.kind == "experts" for site in in_block(run.model.sites, index))
    observer = Observer({name for name, need in asked.items() if need == "gram"}, 0 if routed else len(asked))
    source, shared = run.hidden(stage - 1, "calibration"), run.inputs("calibration")

    def step(batch: int) -> dict[tuple[str, int], Facts]:
        with observer.batch() as found, run.arithmetic():
            run.model.run_block(index, source.read(batch), shared)
        return found

    with run.model.observe(index, observer, set(asked)):
        for found in run.workers.map(step, range(len(run.texts.batches))):
            observer.merge(found)
    source.close()
    return {
        site.name: [observer.facts(site.name, expert, site.shape[1]) for expert in range(site.experts)]
        for site in in_block(run.model.sites, index)
    }
