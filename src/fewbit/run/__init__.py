# SPDX-License-Identifier: Apache-2.0
"""The pipeline: a model and a recipe in, a checked folder out. See :func:`quantize` and :func:`plan`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import fewbit
from fewbit import calibrate
from fewbit.calibrate import Calibration
from fewbit.containers import manifest as M
from fewbit.core.defaults import exact
from fewbit.errors import SpecError, UnsupportedError
from fewbit.model.checkpoint import Checkpoint, open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.model.surgery import Preparation
from fewbit.recipe import Recipe
from fewbit.run import from_facts
from fewbit.run import opening as O
from fewbit.run.again import run_all
from fewbit.run.effort import Text
from fewbit.run.ending import describe, finish
from fewbit.run.events import Event, Progress
from fewbit.run.facts import KeptFacts
from fewbit.run.journal import Journal
from fewbit.run.learning import learned
from fewbit.run.planning import Plan, make_plan
from fewbit.run.sensitivity import Sensitivity
from fewbit.run.state import STATE, Run
from fewbit.run.tasks import has_bias
from fewbit.run.workers import Workers, workers

PROBE = (16, 32)
"""Held-out windows and tokens that every run checks itself on: many and short, as neighbours tell much the same. (On
stories15m, every second token of them being scored, they tell the divergence to 13 %; the run says how far.)"""
BATCH_TOKENS = 2048
HEAD = "int8/g64"
ROTATIONS = "rotations.safetensors"


@dataclass(frozen=True)
class Result:
    """A finished folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


@exact()
def quantize(
    model: Any,
    recipe: str | Recipe,
    *,
    out: str | Path,
    method: str = "rtn",
    calibration: str | Path | None = None,
    facts: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    head: str = HEAD,
    samples: int = 128,
    context: int = 512,
    options: dict[str, Any] | None = None,
    transforms: Sequence[str | dict[str, Any]] = (),
    tune: Sequence[str | dict[str, Any]] = (),
    activation: str | None = None,
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "cpu",
    correct_bias: bool = False,
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> Result:
    """Quantize ``model`` into the folder ``out``, checked before it gets its name.

    Args:
        model: a Hugging Face folder, a ``.gguf`` file, a hub id, or a transformers model (with ``tokenizer``).
        recipe: a format such as ``"int4/g128/asym"``, a scheme such as ``"W4A16"``, or a :class:`Recipe`.
        method, activation: for a format: ``rtn``, ... with ``options``, ``transforms`` and ``tune``; that of inputs.
        calibration, samples, context, seed: text (None: bundled), windows, tokens in each, what draws them.
        facts: a folder of :func:`fewbit.collect` to use instead: layers are solved on what the float model shows.
        calibration_dtype: of products in blocks that calibrate; "auto": bfloat16 where the processor multiplies it.
        threads, device: how many (any number gives the same bytes, None takes torch's); where tuned blocks run.
        correct_bias, head: take the mean error of outputs from biases; format of embedding and head, or "float".
        force: accept few bits without data, an old ``out``, bad results.

    Raises:
        FewbitError: see :mod:`fewbit.errors`. A stopped run's work is in ``OUT.partial``; the same call goes on.
    """
    chosen = O.chosen(recipe, method, head, options, transforms, tune, activation)
    tell, target = progress or O.silent, O.target(out, samples, context, seed, threads, device, calibration)
    with O.source(model, tokenizer, target) as path, workers(threads) as pool:
        streamed = StreamedModel.open(checkpoint := open_checkpoint(path), _preparation(chosen, seed))
        planned = _planned(checkpoint, streamed, chosen, Text(samples, context, BATCH_TOKENS), force, tell)
        _check(streamed, planned, chosen, device, facts, correct_bias)
        words, products = checkpoint.words(), O.products(calibration_dtype)
        data, whole = _texts(checkpoint, words, chosen, correct_bias, facts, calibration, samples, context, seed, tell)
        kept, data = from_facts.read(facts, checkpoint, planned, data, calibration is not None)
        fingerprint = _fingerprint(checkpoint, chosen, data, whole, seed, products, kept, device, correct_bias)
        if (finished := _finished(target, fingerprint, tell)) is not None:
            return finished
        journal = Journal.open((folder := O.open_folder(target, force)) / STATE / "journal.json", fingerprint)
        probe = calibrate.probe(words, PROBE[0], min(PROBE[1], O.longest(checkpoint)))
        prepared = _learned(chosen, streamed, planned, data, folder, pool, tell, seed)
        run = Run(prepared, planned, folder, journal, data, _batch(data), probe, pool, tell, products, seed, device)
        run.kept, run.sensitivity, run.correct_bias = kept, _sensitivity(run), correct_bias
        run.end, run.whole = chosen.end, whole
        run_all(run)
        return Result(target, finish(run, checkpoint, chosen, seed, target, force))


@exact()
def plan(
    model: str | Path,
    recipe: str | Recipe,
    *,
    method: str = "rtn",
    head: str = HEAD,
    samples: int = 128,
    context: int = 512,
    options: dict[str, Any] | None = None,
    transforms: Sequence[str | dict[str, Any]] = (),
    tune: Sequence[str | dict[str, Any]] = (),
    activation: str | None = None,
    facts: str | Path | None = None,
    force: bool = False,
) -> Plan:
    """What :func:`quantize` would do with the same arguments; reads no weight but to tell whose ``facts`` are. See
    :mod:`fewbit.run.planning`. Static grids that facts fix, and no transform depends on, are those of the run."""
    chosen = O.chosen(recipe, method, head, options, transforms, tune, activation)
    O.check_text(samples, context)
    checkpoint = open_checkpoint(model)
    streamed = StreamedModel.open(checkpoint, _preparation(chosen, 0))
    text = Text(samples if facts is None else 0, context, BATCH_TOKENS)
    planned = make_plan(checkpoint, streamed, chosen, text, force)
    from_facts.check_plan(facts, planned, chosen)
    kept, _ = from_facts.read(facts, checkpoint, planned, None, named=False)
    return planned if kept is None else from_facts.bound(planned, kept)


def _planned(
    checkpoint: Checkpoint, streamed: StreamedModel, recipe: Recipe, text: Text, force: bool, tell: Progress
) -> Plan:
    """The plan, its warnings told."""
    planned = make_plan(checkpoint, streamed, recipe, text, force)
    for message in planned.warnings:
        tell(Event("note", message=message))
    return planned


def _check(
    model: StreamedModel, planned: Plan, recipe: Recipe, device: str, facts: str | Path | None, correct_bias: bool
) -> None:
    """Refuse a device that is not there, what facts alone cannot tell, and biases that cannot be corrected.

    Raises:
        SpecError, UnsupportedError: what cannot be.
    """
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise SpecError(f"tuning on device {device!r}", "torch finds no such device here", "cpu, or cuda with a GPU")
    from_facts.check_plan(facts, planned, recipe)
    _check_biases(correct_bias, model, planned, recipe)


def _check_biases(asked: bool, model: StreamedModel, planned: Plan, recipe: Recipe) -> None:
    """Refuse to correct biases that are not there, or that the whole model would learn around.

    Raises:
        UnsupportedError: what cannot be.
    """
    inside = [decision.site for decision in planned.decisions if decision.rule and decision.site.block is not None]
    if asked and not any(has_bias(model, site) for site in inside):
        found = "no layer that is quantized has a bias"
        raise UnsupportedError("correcting biases", found, "leave it out; gptq weighs the mean of the inputs too")
    if asked and recipe.end is not None:
        found = f"{recipe.end.name} begins with the float model's biases"
        raise UnsupportedError("correcting biases", found, f"leave out one of them; {recipe.end.name} sees mean errors")


def _preparation(recipe: Recipe, seed: int) -> Preparation | None:
    """What the recipe does to the model as a whole."""
    return None if recipe.model is None else Preparation(recipe.model.name, recipe.model.options, seed)


def _learned(
    recipe: Recipe,
    model: StreamedModel,
    plan: Plan,
    data: Calibration | None,
    folder: Path,
    pool: Workers,
    tell: Progress,
    seed: int,
) -> StreamedModel:
    """``model`` with the rotations that the recipe learns, where it does."""
    random = _preparation(recipe, seed)
    if random is None or recipe.model is None or not recipe.model.learns or data is None:
        return model
    matrices = learned(folder / STATE / ROTATIONS, model, random, plan.decisions, data.ids, pool, tell)
    return StreamedModel.open(model.checkpoint, replace(random, learned=matrices))


def _fingerprint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    data: Calibration | None,
    whole: Calibration | None,
    seed: int,
    products: torch.dtype,
    kept: KeptFacts | None,
    device: str,
    correct_bias: bool,
) -> dict[str, str]:
    """Everything that the bytes of the result depend on."""
    return {
        "version": fewbit.__version__,
        "code": O.code_hash(),
        **O.model_hashes(checkpoint),
        "recipe": describe(recipe),
        "calibration": data.sha256 if data else "none",
        "calibration_dtype": str(products) if data else "none",
        "whole": whole.sha256 if whole and recipe.end else "none",
        "facts": kept.sha256 if kept else "none",
        "seed": str(seed),
        "device": device,
        "correct_bias": str(correct_bias),
    }


def _texts(
    checkpoint: Checkpoint,
    words: Any,
    recipe: Recipe,
    correct_bias: bool,
    facts: str | Path | None,
    source: str | Path | None,
    samples: int,
    context: int,
    seed: int,
    tell: Progress,
) -> tuple[Calibration | None, Calibration | None]:
    """Text for the methods, transforms and tunings that need it, None when nothing does, or ``facts`` stand for it and
    no text is named: ``samples`` windows for blocks; and all that the whole model learns from, of which these are some,
    from all over."""
    if facts is not None and source is None and recipe.end is None:
        return None, None
    if not any(rule.calibrated for rule in recipe.rules) and not recipe.learns and not correct_bias:
        if source is not None:
            tell(Event("note", message=f"the calibration text {source} is not used: nothing in the recipe needs data"))
        return None, None
    whole = O.draw(checkpoint, words, source, max(samples, recipe.windows), context, seed, tell)
    if len(whole.ids) <= samples:
        return whole, whole
    return Calibration(whole.source, whole.ids[:: len(whole.ids) // samples][:samples].contiguous()), whole


def _sensitivity(run: Run) -> Sensitivity | None:
    """The Fisher diagonal of the weights whose method asks for it, collected; None where none does."""
    wanted = frozenset(name for name, rule in run.plan.rules.items() if rule.row().needs == "fisher")
    if run.calibration is None or not wanted:
        return None
    folder = run.state / "sensitivity"
    found = Sensitivity(
        run.model, run.calibration.ids, folder, wanted, run.workers, run.progress, run.calibration_dtype
    )
    found.collect()
    return found


def _batch(data: Calibration | None) -> int:
    """Windows at once: the largest divisor of their number that stays within BATCH_TOKENS, so batches are equal."""
    if data is None:
        return 1
    number, context = data.ids.shape
    return next(size for size in range(max(1, BATCH_TOKENS // context), 0, -1) if number % size == 0)


def _finished(target: Path, fingerprint: dict[str, str], tell: Progress) -> Result | None:
    """The result of the very same run, if ``target`` holds it; its files are checked again."""
    if not (target / M.NAME).is_file():
        return None
    manifest = M.read(target)
    if manifest.get("fingerprint") != fingerprint:
        return None
    M.check_files(target, manifest)
    shutil.rmtree(target / STATE, ignore_errors=True)
    tell(Event("done", message=f"{target} is finished already"))
    return Result(target, manifest)


__all__ = ["Event", "Plan", "Progress", "Result", "plan", "quantize"]
