# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder: config.json, safetensors in one file or in shards, tokenizer."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fewbit.containers.files import LARGEST_SIDECAR, member, read_json, size_of, write_bytes, write_json
from fewbit.containers.safetensors import SafetensorsFile
from fewbit.containers.shards import refuse_scaled, weight_files
from fewbit.errors import InputError, UnsupportedError
from fewbit.model.checkpoint import Checkpoint, check_layers
from fewbit.model.classes import config_in
from fewbit.model.tokenizer import FILES, of_transformers, open_tokenizer

FLOATS = {torch.float16, torch.bfloat16, torch.float32}
QUANTIZED = ("quantization_config", "compression_config")
"""Where a configuration says who has quantized its weights; the latter in old ones of compressed-tensors."""
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""What a vision-language model makes its inputs of images by."""


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in ``folder``; code that the folder may bring is never run.

    Raises:
        InputError, CorruptFileError: absent, not JSON, or contradictory.
        UnsupportedError: transformers does not know its model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"opening the model {folder}", "it has no config.json", "a Hugging Face model folder")
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str):
        raise InputError(f"reading {path}", "it names no model_type", "the config.json of a transformers model")
    found = next((raw[key] for key in QUANTIZED if raw.get(key) is not None), None)
    if found is not None:
        by = found.get("quant_method") if isinstance(found, dict) else None
        raise UnsupportedError(
            f"opening the model {folder}", f"it is quantized already, by {by}", "the original weights"
        )
    return config_in(folder)


class FolderCheckpoint(Checkpoint):
    """Final; see :func:`fewbit.model.checkpoint.open_checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.path, self.ignored = folder, []
        self.config = read_config(folder)
        self._shards = weight_files(folder)
        refuse_scaled(folder, self._shards)
        self._of = {key: shard for shard in self._shards for key in shard.entries}
        self.files = [shard.path for shard in self._shards]
        check_layers(self.config, self._of, folder)
        named = self.config.architectures or [self.config.model_type]
        if not isinstance(named, list) or not isinstance(named[0], str):
            raise InputError(
                f"reading {folder / 'config.json'}", f"its architectures are {str(named)[:80]}", "a class name"
            )
        self.architecture: str = named[0]

    def keys(self) -> list[str]:
        return list(self._of)

    def _shard(self, key: str) -> SafetensorsFile:
        if key not in self._of:
            raise InputError(f"tensor {key} of {self.path}", "there is none of that name")
        return self._of[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shard(key).entries[key].shape

    def floating(self, key: str) -> bool:
        return self._shard(key).entries[key].dtype.is_floating_point

    def get(self, key: str) -> Tensor:
        return self._shard(key).get(key)

    @property
    def dtype(self) -> torch.dtype | None:
        found = {
            entry.dtype for shard in self._shards for entry in shard.entries.values() if entry.dtype.is_floating_point
        }
        return reduce(torch.promote_types, found) if found and found <= FLOATS else None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for shard in self._shards for entry in shard.entries.values())

    def tokenizer(self) -> Any:
        return of_transformers(self.path)

    def words(self) -> Any:
        return open_tokenizer(self.path) or self.tokenizer()

    def save_sidecars(self, out: Path) -> dict[str, str]:
        config = read_json(self.path / "config.json")
        config.pop("quantization_config", None)
        written = {"config.json": write_json(out / "config.json", config)}
        for name in ("generation_config.json", *PROCESSOR, *FILES):
            path = self.path / name
            if path.is_file() and size_of(path) <= LARGEST_SIDECAR:
                written[name] = write_bytes(out / name, member(self.path, name).read_bytes())
        return written
