# SPDX-License-Identifier: Apache-2.0
"""The pipeline: a model and a recipe in, a checked folder out. See :func:`quantize` and :func:`plan`."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import fewbit
from fewbit import calibrate
from fewbit.calibrate import Calibration
from fewbit.containers import manifest as M
from fewbit.errors import InputError, SpecError
from fewbit.model.checkpoint import Checkpoint, open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.model.surgery import Preparation
from fewbit.recipe import Recipe
from fewbit.run.ending import STATE, describe, finish
from fewbit.run.events import Event, Progress
from fewbit.run.journal import Journal
from fewbit.run.learning import learned
from fewbit.run.planning import Plan, make_plan
from fewbit.run.stages import run_stages
from fewbit.run.state import Run
from fewbit.run.workers import Workers, workers

PROBE = (8, 256)
"""Held-out windows and tokens that every run checks itself on."""
BATCH_TOKENS = 2048
HEAD = "int8/g64"
ROTATIONS = "rotations.safetensors"
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names under which a configuration gives the longest context."""


@dataclass(frozen=True)
class Result:
    """A finished folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


def quantize(
    model: Any,
    recipe: str | Recipe,
    *,
    out: str | Path,
    method: str = "rtn",
    calibration: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    head: str = HEAD,
    samples: int = 128,
    context: int = 512,
    options: dict[str, Any] | None = None,
    transforms: Sequence[str | dict[str, Any]] = (),
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> Result:
    """Quantize ``model`` into the folder ``out``, checked before it gets its name.

    Args:
        model: a Hugging Face folder, a ``.gguf`` file, a hub id, or a transformers model (with ``tokenizer``).
        recipe: a format such as ``"int4/g128/asym"``, a scheme such as ``"W4A16"``, or a :class:`Recipe`.
        method: for a format: ``rtn``, ``clip``, ``gptq``, ... with ``options``, after ``transforms`` (``["smooth"]``).
        calibration: a .txt or .jsonl file; bundled text when None.
        samples, context, seed: windows, tokens in each, and what they are drawn with.
        calibration_dtype: of the matrix products that calibration runs through the blocks; "auto" takes bfloat16 where
            the processor multiplies it natively. Statistics, solving and checking are float32 or wider.
        threads: how many; any number gives the same bytes. None takes torch's.
        head: format of the embedding and the head, or ``"float"``.
        force: accept below 3 bits without data, replace ``out``, and accept a broken result.

    Raises:
        FewbitError: see :mod:`fewbit.errors`. A stopped run's work is in ``OUT.partial``; the same call goes on.
    """
    chosen, target, tell = _recipe(recipe, method, head, options, transforms), Path(out), progress or _silent
    with _source(model, tokenizer, target) as path:
        checkpoint = open_checkpoint(path)
        streamed = StreamedModel.open(checkpoint, _preparation(chosen, seed))
        planned = make_plan(checkpoint, streamed, chosen, samples * context, BATCH_TOKENS, force)
        for message in planned.warnings:
            tell(Event("note", message=message))
        words = checkpoint.tokenizer()
        data = _calibration(checkpoint, words, chosen, calibration, samples, context, seed, tell)
        products = _calibration_dtype(calibration_dtype)
        fingerprint = _fingerprint(checkpoint, chosen, data, seed, products)
        if (finished := _finished(target, fingerprint)) is not None:
            tell(Event("done", message=f"{target} is finished already"))
            return finished
        folder = _open_folder(target, force)
        journal = Journal.open(folder / STATE / "journal.json", fingerprint)
        probe = calibrate.probe(words, PROBE[0], min(PROBE[1], _longest(checkpoint)))
        with workers(threads) as pool:
            prepared = _learned(chosen, streamed, planned, data, folder, pool, tell, seed)
            run = Run(prepared, planned, folder, journal, data, _batch(data), probe, pool, tell, products, seed)
            run_stages(run)
            manifest = finish(run, checkpoint, chosen, seed, target, force)
    tell(Event("done", message=str(target)))
    return Result(target, manifest)


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
    force: bool = False,
) -> Plan:
    """What :func:`quantize` would do with the same arguments; reads no weight. See :mod:`fewbit.run.planning`."""
    checkpoint = open_checkpoint(model)
    chosen = _recipe(recipe, method, head, options, transforms)
    streamed = StreamedModel.open(checkpoint, _preparation(chosen, 0))
    return make_plan(checkpoint, streamed, chosen, samples * context, BATCH_TOKENS, force)


def _silent(event: Event) -> None:
    """For callers that want no progress."""


def _recipe(
    recipe: str | Recipe,
    method: str,
    head: str,
    options: dict[str, Any] | None,
    transforms: Sequence[str | dict[str, Any]],
) -> Recipe:
    if isinstance(recipe, str):
        return Recipe.simple(recipe, method, head, options, transforms)
    if transforms:
        raise SpecError("transforms beside a Recipe", "a recipe names its own", "write them into its rules")
    return recipe


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


def _longest(checkpoint: Checkpoint) -> int:
    """Positions that the model was made for."""
    text = checkpoint.config.get_text_config()
    return next((limit for name in POSITIONS if type(limit := getattr(text, name, None)) is int), 1 << 30)


def _calibration_dtype(asked: str) -> torch.dtype:
    if asked == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if asked not in ("float32", "bfloat16"):
        raise SpecError(f"calibration_dtype {asked!r}", "no such choice", "auto, float32 or bfloat16")
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def _fingerprint(
    checkpoint: Checkpoint, recipe: Recipe, data: Calibration | None, seed: int, products: torch.dtype
) -> dict[str, str]:
    """Everything that the bytes of the result depend on."""
    return {
        "version": fewbit.__version__,
        "code": _code(),
        "weights": checkpoint.fingerprint(),
        "config": hashlib.sha256(checkpoint.config.to_json_string().encode()).hexdigest(),
        "recipe": describe(recipe),
        "calibration": data.sha256 if data else "none",
        "calibration_dtype": str(products) if data else "none",
        "seed": str(seed),
    }


def _code() -> str:
    """Hash of the package's own source: another fewbit of the same version must not continue this one's work."""
    home, state = Path(fewbit.__file__).parent, hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        state.update(f"{path.relative_to(home).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()


def _calibration(
    checkpoint: Checkpoint,
    words: Any,
    recipe: Recipe,
    source: str | Path | None,
    samples: int,
    context: int,
    seed: int,
    tell: Progress,
) -> Calibration | None:
    """Text for the methods and transforms that need it; None when no rule does."""
    if all(rule.needs == "nothing" for rule in recipe.rules) and not (recipe.model and recipe.model.learns):
        if source is not None:
            tell(Event("note", message=f"the calibration text {source} is not used: nothing in the recipe needs data"))
        return None
    if context > (longest := _longest(checkpoint)):
        tell(Event("note", message=f"calibrating with windows of {longest} tokens, the most this model takes"))
        context = longest
    data = calibrate.calibration(words, source, samples, context, seed)
    if len(data.ids) < samples:
        tell(
            Event("note", message=f"calibration text {data.source} gives {len(data.ids)} samples instead of {samples}")
        )
    return data


def _batch(data: Calibration | None) -> int:
    """Windows at once: the largest divisor of their number that stays within BATCH_TOKENS, so batches are equal."""
    if data is None:
        return 1
    number, context = data.ids.shape
    return next(size for size in range(max(1, BATCH_TOKENS // context), 0, -1) if number % size == 0)


def _finished(target: Path, fingerprint: dict[str, str]) -> Result | None:
    """The result of the very same run, if ``target`` holds it; its files are checked again."""
    if not (target / M.NAME).is_file():
        return None
    manifest = M.read(target)
    if manifest.get("fingerprint") != fingerprint:
        return None
    M.check_files(target, manifest)
    shutil.rmtree(target / STATE, ignore_errors=True)
    return Result(target, manifest)


def _open_folder(target: Path, force: bool) -> Path:
    """``OUT.partial``, made if need be.

    Raises:
        InputError: ``target`` exists and ``force`` is off, or nothing can be written there.
    """
    if target.exists() and not force:
        works = "give another -o, remove it, or --force to replace it"
        raise InputError(f"writing {target}", "it exists already", works)
    folder = target.with_name(target.name + ".partial")
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"writing {target}", f"{error.strerror}", "give a folder that you may write to") from None
    return folder


@contextmanager
def _source(model: Any, tokenizer: Any, target: Path) -> Iterator[str | Path]:
    """A path for ``model``; a model in memory is written to a temporary folder first."""
    if isinstance(model, (str, Path)):
        yield model
        return
    if tokenizer is None:
        raise SpecError("quantizing a model in memory", "no tokenizer was given", "pass tokenizer=...")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.source-", dir=target.parent))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Event", "Plan", "Progress", "Result", "plan", "quantize"]
