# SPDX-License-Identifier: Apache-2.0
"""What runs begin with: the model's folder, the place for the work, and hashes of what the result depends on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit import calibrate
from fewbit.calibrate import Calibration, Text
from fewbit.containers.files import refuse_folder, remove_begun
from fewbit.core import given
from fewbit.errors import InputError, SpecError
from fewbit.model.checkpoint import Checkpoint
from fewbit.recipe import Recipe
from fewbit.run.events import Event, Progress
from fewbit.run.state import STATE

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names under which a configuration gives the longest context."""


def silent(event: Event) -> None:
    """For callers that want no progress."""


def chosen(
    recipe: str | Recipe,
    method: str,
    head: str,
    options: dict[str, Any] | None,
    transforms: Sequence[str | dict[str, Any]],
    tune: Sequence[str | dict[str, Any]],
    activation: str | None,
) -> Recipe:
    """``recipe``, or where it is a format, :meth:`Recipe.simple` of it.

    Raises:
        SpecError: a recipe is given and something beside it that it names itself, or an argument is of another kind.
    """
    works = "a format such as 'int4/g64', or a fewbit.Recipe, such as Recipe.from_dict({'rule': [...]})"
    given.kind("what to quantize to", recipe, (str, Recipe), works)
    given.kind("head", head, str, "a format such as 'int8/g64', or 'float'")
    given.optional("options", options, dict, "names and values of the method's options")
    for name, entries in (("transforms", transforms), ("tune", tune)):
        given.kind(name, entries, (list, tuple), "names, or tables with a name, in a list")
    given.optional("activation", activation, str, "the spelling of a format, for example 'int8/channel'")
    if isinstance(recipe, str):
        return Recipe.simple(recipe, method, head, options, transforms, tune, activation)
    beside = {"transforms": transforms, "tune": tune, "activation": activation}
    if what := next((name for name, value in beside.items() if value), None):
        raise SpecError(f"{what} beside a Recipe", "a recipe names its own", "write them into its rules")
    return recipe


def check_text(text: Text) -> None:
    """Refuse what are no numbers of windows and of tokens in each, and no file. Raises SpecError."""
    given.whole(1, samples=text.samples, context=text.context)
    given.optional("the calibration text", text.source, (str, Path), "a .txt or .jsonl file")


def target(out: str | Path, text: Text, seed: int, threads: int | None, device: str) -> Path:
    """``out``, arguments of another kind beside it being refused. Raises SpecError, which names the first."""
    check_text(text)
    given.whole(0, threads=threads or 0)
    given.kind("seed", seed, int, "a whole number")
    given.kind("device", device, str, "'cpu', or 'cuda' with a GPU")
    return given.place("out", out)


@contextmanager
def source(model: Any, tokenizer: Any, target: Path) -> Iterator[str | Path]:
    """A path for ``model``; a model in memory is written to a temporary folder first."""
    if isinstance(model, (str, Path)):
        yield model
        return
    given.model("the model to quantize", model)
    if tokenizer is None:
        raise SpecError("quantizing a model in memory", "no tokenizer was given", "pass tokenizer=...")
    if empty := next((name for name, tensor in model.named_parameters() if tensor.is_meta), None):
        found = f"{empty} is on the meta device, which holds no numbers"
        raise InputError("quantizing a model in memory", found, "a model that was loaded, or its folder, works")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.source-", dir=target.parent))
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def work_in(target: Path, force: bool, mark: str, *sources: Path) -> Iterator[Path]:
    """``OUT.partial``, made if need be, for this process alone as long as it is open; without what a run that was
    killed had begun to write there. The rest is :func:`fewbit.containers.files.refuse_folder`'s.

    Raises:
        InputError: ``target`` cannot be replaced, nothing can be written there, or another process is at work there.
    """
    refuse_folder(target, force, mark, *sources)
    folder = target.with_name(target.name + ".partial")
    try:
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"writing {target}", f"{error.strerror}", "give a folder that you may write to") from None
    try:
        _lock(handle, folder)
        remove_begun(folder)
        yield folder
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    """Keep other processes out until ``handle`` is closed, which the end of this one does, however it ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found = f"another process is at work in {folder}"
        raise InputError(f"writing {folder}", found, "wait for it, or give another name") from None
    except OSError:
        return  # a file system without locks: whoever starts two runs there must give them two names


def model_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Of all that makes the model what it is."""
    return {
        "weights": checkpoint.fingerprint(),
        "config": hashlib.sha256(checkpoint.config.to_json_string().encode()).hexdigest(),
    }


@cache  # as long as this process lives it runs what it has imported
def code_hash() -> str:
    """Hash of the package's own source: another fewbit of the same version must not continue this one's work."""
    home, state = os.path.dirname(fewbit.__file__), hashlib.sha256()
    inside = (os.path.join(folder, name) for folder, _, names in os.walk(home) for name in names)
    places = ((place[len(home) + 1 :].replace(os.sep, "/"), place) for place in inside if place.endswith(".py"))
    for name, place in sorted(places):  # hundreds of them, on which pathlib would spend twice the time
        with open(place, "rb", buffering=0) as file:
            source = file.read()
        state.update(f"{name} {len(source)}\n".encode() + source)
    return state.hexdigest()


def longest(checkpoint: Checkpoint) -> int:
    """Positions that the model was made for."""
    text = checkpoint.config.get_text_config()
    return next((limit for name in POSITIONS if type(limit := getattr(text, name, None)) is int), 1 << 30)


def products(asked: str) -> torch.dtype:
    """What ``calibration_dtype`` means here."""
    if asked == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    if asked not in ("float32", "bfloat16"):
        raise SpecError(f"calibration_dtype {asked!r}", "no such choice", "auto, float32 or bfloat16")
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def draw(checkpoint: Checkpoint, words: Any, text: Text, seed: int, tell: Progress) -> Calibration:
    """Calibration windows of ``text``, no longer than the model takes."""
    samples, context = text.samples, min(text.context, longest(checkpoint))
    if context < text.context:
        tell(Event("note", message=f"calibrating with windows of {context} tokens, the most this model takes"))
    data = calibrate.calibration(words, text.source, samples, context, seed)
    if (found := len(data.ids)) < samples:
        tell(Event("note", message=f"calibration text {data.source} gives {found} samples instead of {samples}"))
    return data
