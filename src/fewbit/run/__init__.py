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
from fewbit.calibrate import Calibration, Text
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
from fewbit.run.ending import describe, finish
from fewbit.run.events import Event, Progress
from fewbit.run.facts import KeptFacts
from fewbit.run.journal import Journal
from fewbit.run.learning import learned
from fewbit.run.planning import Plan, make_plan
from fewbit.run.sensitivity import Sensitivity
from fewbit.run.state import STATE, Asked, Run, Texts
from fewbit.run.tasks import has_bias
from fewbit.run.workers import workers

PROBE = (16, 32)
"""Held-out windows and tokens that every run checks itself on: many and short, as neighbours tell much the same. (On
stories15m, every second token of them being scored, they tell the divergence to 13 %; the run says how far.)"""
HEAD = "int8/g64"


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
    text, tell, products = Text(samples, context, calibration), progress or O.silent, O.products(calibration_dtype)
    target = O.target(out, text, seed, threads, device)
    asked = Asked(chosen, text, seed, facts, products, device, correct_bias, force)
    with O.source(model, tokenizer, target) as path, workers(threads) as pool:
        streamed = StreamedModel.open(checkpoint := open_checkpoint(path), _preparation(chosen, seed))
        planned = _planned(streamed, asked, tell)
        texts, kept = _texts(checkpoint, planned, asked, tell)
        fingerprint = _fingerprint(checkpoint, asked, texts, kept)
        if (finished := _finished(target, fingerprint, tell)) is not None:
            return finished
        with O.work_in(target, force, M.NAME, checkpoint.path) as folder:
            journal = Journal.open(folder / STATE / "journal.json", fingerprint)
            run = Run(asked, streamed, planned, folder, journal, texts, kept, pool, tell)
            run.model = _learned(run)
            run.sensitivity = _sensitivity(run)
            return Result(target, finish(run_all(run), target))


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
    chosen, text = O.chosen(recipe, method, head, options, transforms, tune, activation), Text(samples, context)
    O.check_text(text)
    streamed = StreamedModel.open(open_checkpoint(model), _preparation(chosen, 0))
    planned = make_plan(streamed.checkpoint, streamed, chosen, text if facts is None else Text(0, context), force)
    from_facts.check_plan(facts, planned, chosen)
    kept = from_facts.read(facts, streamed.checkpoint, planned)
    return planned if kept is None else from_facts.bound(planned, kept)


def _planned(model: StreamedModel, asked: Asked, tell: Progress) -> Plan:
    """The plan, its warnings told; refused are a device that is not there, what facts alone cannot tell, and biases
    that cannot be corrected.

    Raises:
        SpecError, UnsupportedError: what cannot be.
    """
    planned = make_plan(model.checkpoint, model, asked.recipe, asked.text, asked.force)
    for message in planned.warnings:
        tell(Event("note", message=message))
    device = asked.device
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise SpecError(f"tuning on device {device!r}", "torch finds no such device here", "cpu, or cuda with a GPU")
    from_facts.check_plan(asked.facts, planned, asked.recipe)
    if asked.correct_bias:
        _check_biases(model, planned, asked.recipe)
    return planned


def _check_biases(model: StreamedModel, planned: Plan, recipe: Recipe) -> None:
    """Refuse to correct biases that are not there, or that the whole model would learn around.

    Raises:
        UnsupportedError: what cannot be.
    """
    inside = [decision.site for decision in planned.decisions if decision.rule and decision.site.block is not None]
    if not any(has_bias(model, site) for site in inside):
        found = "no layer that is quantized has a bias"
        raise UnsupportedError("correcting biases", found, "leave it out; gptq weighs the mean of the inputs too")
    if recipe.end is not None:
        found = f"{recipe.end.name} begins with the float model's biases"
        raise UnsupportedError("correcting biases", found, f"leave out one of them; {recipe.end.name} sees mean errors")


def _preparation(recipe: Recipe, seed: int) -> Preparation | None:
    """What the recipe does to the model as a whole."""
    return None if recipe.model is None else Preparation(recipe.model.name, recipe.model.options, seed)


def _learned(run: Run) -> StreamedModel:
    """The model of ``run`` with the rotations that its recipe learns, where it does."""
    step, random = run.asked.recipe.model, _preparation(run.asked.recipe, run.asked.seed)
    if random is None or step is None or not step.learns or run.texts.calibration is None:
        return run.model
    return StreamedModel.open(run.model.checkpoint, replace(random, learned=learned(run, random)))


def _fingerprint(checkpoint: Checkpoint, asked: Asked, texts: Texts, kept: KeptFacts | None) -> dict[str, str]:
    """Everything that the bytes of the result depend on."""
    data, whole = texts.calibration, texts.whole
    return {
        "version": fewbit.__version__,
        "code": O.code_hash(),
        **O.model_hashes(checkpoint),
        "recipe": describe(asked.recipe),
        "calibration": data.sha256 if data else "none",
        "calibration_dtype": str(asked.products) if data else "none",
        "whole": whole.sha256 if whole and asked.recipe.end else "none",
        "facts": kept.sha256 if kept else "none",
        "seed": str(asked.seed),
        "device": asked.device,
        "correct_bias": str(asked.correct_bias),
    }


def _texts(checkpoint: Checkpoint, planned: Plan, asked: Asked, tell: Progress) -> tuple[Texts, KeptFacts | None]:
    """What the run reads: text, and the facts that may stand for that of the blocks."""
    words = checkpoint.words()
    data, whole = _calibration(checkpoint, words, asked, tell)
    kept = from_facts.read(asked.facts, checkpoint, planned, data if asked.text.source is not None else None)
    probe = calibrate.probe(words, PROBE[0], min(PROBE[1], O.longest(checkpoint)))
    return Texts(data if kept is None else None, whole, probe), kept


def _calibration(
    checkpoint: Checkpoint, words: Any, asked: Asked, tell: Progress
) -> tuple[Calibration | None, Calibration | None]:
    """Text for the methods, transforms and tunings that need it, None when nothing does, or facts stand for it and no
    text is named: so many windows for blocks; and all that the whole model learns from, of which these are some, from
    all over."""
    recipe, text, samples = asked.recipe, asked.text, asked.text.samples
    if asked.facts is not None and text.source is None and recipe.end is None:
        return None, None
    if not any(rule.calibrated for rule in recipe.rules) and not recipe.learns and not asked.correct_bias:
        if text.source is not None:
            message = f"the calibration text {text.source} is not used: nothing in the recipe needs data"
            tell(Event("note", message=message))
        return None, None
    whole = O.draw(checkpoint, words, replace(text, samples=max(samples, recipe.windows)), asked.seed, tell)
    if len(whole.ids) <= samples:
        return whole, whole
    return Calibration(whole.source, whole.ids[:: len(whole.ids) // samples][:samples].contiguous()), whole


def _sensitivity(run: Run) -> Sensitivity | None:
    """The Fisher diagonal of the weights whose method asks for it, collected; None where none does."""
    wanted, data = frozenset(name for name, rule in run.plan.rules.items() if rule.row().needs == "fisher"), run.texts
    if data.calibration is None or not wanted:
        return None
    folder, products = run.state / "sensitivity", run.asked.products
    found = Sensitivity(run.model, data.calibration.ids, folder, wanted, run.workers, run.progress, products)
    found.collect()
    return found


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
