# SPDX-License-Identifier: Apache-2.0
"""Facts collected once, for any number of runs: see :func:`collect` and :func:`merge`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import fewbit
from fewbit.calibrate import Calibration, Text
from fewbit.containers.files import digest, take_place, write_json
from fewbit.containers.manifest import FACTS
from fewbit.containers.safetensors import open_safetensors, write_safetensors
from fewbit.core import given
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.errors import InputError
from fewbit.model.checkpoint import Checkpoint, open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.run import facts as K
from fewbit.run import opening as O
from fewbit.run.events import Event, Progress
from fewbit.run.journal import Journal
from fewbit.run.sensitivity import Sensitivity
from fewbit.run.state import STATE
from fewbit.run.workers import workers


@exact()
def collect(
    model: Any,
    *,
    out: str | Path,
    calibration: str | Path | None = None,
    samples: int = 128,
    context: int = 512,
    seed: int = 0,
    gram: bool = True,
    fisher: bool = True,
    ranges: bool = True,
    threads: int | None = None,
    force: bool = False,
    calibration_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    progress: Progress | None = None,
    tokenizer: Any = None,
) -> K.KeptFacts:
    """What ``model`` in float shows of its layers on a calibration text, into the folder ``out``.

    Sums, squares and largest magnitudes of the inputs of every layer of the blocks; with ``gram`` their second moments
    E[x x^T] (4 columns^2 bytes a group of layers), with ``fisher`` the Fisher diagonal of the weights (4 bytes a
    weight, and on disk, while at it, what enters every block) and the squared gradients at the outputs of layers, with
    ``ranges`` histograms of the inputs (at most 32 KiB a group of layers), from which any observer fixes a grid. Other
    arguments are those of :func:`fewbit.quantize`, which takes the folder as ``facts``.

    Raises:
        FewbitError: see :mod:`fewbit.errors`. An interrupted call leaves its work in ``OUT.partial``, from which the
            same call continues.
    """
    target, tell, products = given.place("out", out), progress or O.silent, O.products(calibration_dtype)
    with O.source(model, tokenizer, target) as path:
        checkpoint = open_checkpoint(path)
        streamed = StreamedModel.open(checkpoint)
        data = O.draw(checkpoint, checkpoint.words(), Text(samples, context, calibration), seed, tell)
        wishes = {"gram": gram, "fisher": fisher, "ranges": ranges}
        described = _described(checkpoint, data, wishes, len(streamed.blocks), str(products))
        if (found := _finished(target, described)) is not None:
            tell(Event("done", message=f"{target} is finished already"))
            return found
        fingerprint = {"code": O.code_hash(), **{key: str(value) for key, value in described.items()}}
        wanted = frozenset(site.name for site in streamed.sites if fisher and site.block is not None)
        watched: Literal["gram", "mean_square"] = "gram" if gram else "mean_square"
        with O.work_in(target, force, FACTS, checkpoint.path) as folder, workers(threads) as pool:
            Journal.open(folder / STATE / "journal.json", fingerprint)
            Sensitivity(streamed, data.ids, folder, wanted, pool, tell, products, watched, ranges).collect()
            kept = _finish(folder, target, described)
    tell(Event("done", message=str(target)))
    return kept


def merge(folders: Sequence[str | Path], *, out: str | Path, force: bool = False) -> K.KeptFacts:
    """Facts of several texts as one, summed in the order of ``folders``; what not all of them hold is left out.

    Raises:
        InputError: they are of different models, or fewer than two, or ``out`` exists and ``force`` is off.
    """
    kept = [K.KeptFacts.read(folder) for folder in folders]
    if len(kept) < 2:
        raise InputError(f"merging {len(kept)} folders of facts", "there is nothing to add", "two or more would work")
    for other in kept[1:]:
        other.check(kept[0].described["model"])
    first, target = kept[0].described, given.place("out", out)
    collected = [what for what in first["collected"] if all(what in other.described["collected"] for other in kept)]
    texts = [each.described["calibration"] for each in kept]
    calibration = {
        "source": " and ".join(str(text["source"]) for text in texts),
        "sha256": " ".join(text["sha256"] for text in texts),
        "samples": sum(text["samples"] for text in texts),
        "context": max(text["context"] for text in texts),
        "tokens": sum(text["tokens"] for text in texts),
    }
    with O.work_in(target, force, FACTS, *(each.path for each in kept)) as folder:
        for block in range(first["blocks"]):
            _merge_inputs(kept, folder, block, "gram" in collected)
            if "fisher" in collected:
                _merge_gradients(kept, folder, block)
        return _finish(folder, target, {**first, "calibration": calibration, "collected": collected})


def _merge_inputs(kept: list[K.KeptFacts], folder: Path, block: int, gram: bool) -> None:
    """Write the sums over the inputs of one block, those that all of ``kept`` saw together."""
    first, *others = (open_safetensors(K.inputs_file(each.path, block)) for each in kept)
    merged: dict[str, list[Facts]] = {}
    for site, owner in K.owners(first).items():
        if owner in merged:
            merged[site] = merged[owner]
            continue
        total = [of if gram else replace(of, gram=None) for of in K.stored(first, site)]
        for other in others:
            total = [one.merge(two) for one, two in zip(total, K.stored(other, site), strict=True)]
        merged[site] = total
    K.write_inputs(K.inputs_file(folder, block), merged)


def _merge_gradients(kept: list[K.KeptFacts], folder: Path, block: int) -> None:
    """Write the Fisher diagonals of one block, and what was seen at its outputs, all of ``kept`` together."""
    files = [open_safetensors(K.fisher_file(each.path, block)) for each in kept]
    total = {name: files[0].get(name) for name in files[0].entries}
    for file in files[1:]:
        for name, values in total.items():
            values += file.get(name)
    write_safetensors(K.fisher_file(folder, block), total, {"format": "pt"})


def _described(
    checkpoint: Checkpoint, data: Calibration, wishes: dict[str, bool], blocks: int, products: str
) -> dict[str, Any]:
    """``facts.json`` without its files."""
    return {
        "facts": K.VERSION,
        "version": fewbit.__version__,
        "model": O.model_hashes(checkpoint),
        "calibration": data.describe(),
        "calibration_dtype": products,
        "collected": ["mean_square", *(what for what, wished in wishes.items() if wished)],
        "blocks": blocks,
    }


def _finished(target: Path, described: dict[str, Any]) -> K.KeptFacts | None:
    """What ``target`` holds, if it is the result of the very same call; its files are checked again."""
    if not (target / FACTS).is_file():
        return None
    kept = K.KeptFacts.read(target)
    return kept if {key: value for key, value in kept.described.items() if key != "files"} == described else None


def _finish(folder: Path, target: Path, described: dict[str, Any]) -> K.KeptFacts:
    """Write what the folder is and give it its name."""
    files = {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))}
    write_json(folder / FACTS, {**described, "files": files})
    shutil.rmtree(folder / STATE, ignore_errors=True)
    for left in folder.glob("*.f32"):
        left.unlink()
    take_place(folder, target)
    return K.KeptFacts.read(target)
