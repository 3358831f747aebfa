# SPDX-License-Identifier: Apache-2.0
"""One side of a comparison: the model or its reference, on disk or in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.containers import manifest as M
from fewbit.core import given
from fewbit.errors import InputError
from fewbit.measure import load as L
from fewbit.measure import size
from fewbit.measure.speed import Generator
from fewbit.measure.worker import Child, Here, Job


@dataclass(frozen=True, eq=False)
class Side:
    """``path`` or ``live`` is set, never both. ``manifest`` is empty unless ``path`` is a fewbit folder; ``activation``
    is what :func:`fewbit.load` knows by that name."""

    name: str
    path: Path | None
    live: Any
    manifest: Mapping[str, Any]
    dtype: torch.dtype
    activation: str | None = None

    @property
    def short(self) -> str:
        """What to call it in a published note: never the path on this machine."""
        return self.name if self.path is None else self.path.name

    @staticmethod
    def of(model: Any, dtype: torch.dtype, activation: str | None = None) -> Side:
        """From a folder, a GGUF file, a hub id or a loaded model.

        Raises:
            InputError: ``activation`` for a model that is no fewbit folder. CorruptFileError: a fewbit folder lacks a
                file, or its bytes changed.
        """
        path = L.find(model) if isinstance(model, str | Path) else None
        manifest = M.read(path) if path is not None and path.is_dir() and (path / M.NAME).is_file() else {}
        if path is not None and manifest:
            M.check_files(path, manifest)
        if activation is not None and not manifest:
            raise InputError(f"activations in {activation}", "the model is no fewbit folder", "leave activation out")
        given.optional("activation", activation, str, "the spelling of a format, for example 'int8/channel'")
        if path is None:
            given.model("the model to measure", model)
            return Side(type(model).__name__, None, model, {}, model.dtype)
        return Side(str(model), path, None, manifest, dtype, activation)

    def open(self) -> Any:
        """The model, in eval mode when it was loaded here."""
        return self.live if self.path is None else L.load_model(self.path, self.dtype, self.activation)

    def tokenizer(self) -> Any | None:
        """Its tokenizer, or None for a model in memory."""
        return None if self.path is None else L.load_tokenizer(self.path)

    def size(self, model: Any) -> size.Size:
        """Bytes and bits; ``model`` is what :meth:`open` gave, of which a fewbit folder has no need."""
        return size.of_model(model) if self.path is None else size.of_path(self.path, self.parameters(model))

    def parameters(self, model: Any) -> int:
        """Number of parameters; of a fewbit folder what its manifest says, as packed weights are no parameters."""
        if not self.manifest:
            return sum(int(p.numel()) for p in model.parameters())
        layers = self.manifest["layers"]
        packed = sum(int(math.prod(layer["shape"])) * int(layer.get("experts", 1)) for layer in layers)
        return packed + sum(int(entry.get("parameters", 0)) for entry in self.manifest["skipped"])

    def subject(self, prompt: Tensor, decode_tokens: int) -> Child | Here:
        """Something to time: a child process that loads the path; a model in memory stays in this process."""
        if self.path is None:
            return Here(Generator(self.live, prompt.unsqueeze(0), decode_tokens))
        dtype = str(self.dtype).removeprefix("torch.")
        job = Job(str(self.path), dtype, prompt.tolist(), decode_tokens, torch.get_num_threads(), self.activation)
        return Child(job)


def reference_of(side: Side, dtype: torch.dtype, notes: list[str]) -> Side | None:
    """The source that a fewbit folder names, if it is still there; otherwise None, and ``notes`` says why."""
    source = side.manifest.get("source", {}).get("path")
    if source is None:
        notes.append("no reference was given: KL, top-1 agreement and the perplexity ratio are not measured")
        return None
    if not Path(source).exists():  # never looked up on the hub: only the user may name a download
        notes.append(f"the original {Path(source).name} is not here any more: KL and top-1 agreement are not measured")
        return None
    return Side.of(source, dtype)
