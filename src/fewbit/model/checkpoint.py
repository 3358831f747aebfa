# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a trained model on disk, read one tensor at a time.

Nothing here runs code from a model folder, reads pickle, or renders a template. The only network call of fewbit is
:func:`download`, for a name that is no local path and looks like ``owner/model``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from fewbit.containers.files import digest
from fewbit.core import given
from fewbit.core.sums import all_finite
from fewbit.errors import InputError, first_line
from fewbit.model.families import LAYER_COUNTS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]


class Checkpoint(ABC):
    """A model's weights by name; abstract, its final forms are a folder and a GGUF file.

    * ``path``: what was opened. ``files``: the weight files. ``architecture``: the class name, ``LlamaForCausalLM``.
    * ``config``: the model's configuration; reading it allocates nothing.
    * ``ignored``: stored tensors that :meth:`keys` leaves out, as no name of the model is theirs.
    """

    path: Path
    config: PretrainedConfig
    architecture: str
    files: list[Path]
    ignored: list[str]

    @abstractmethod
    def keys(self) -> list[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def floating(self, key: str) -> bool:
        """Whether a tensor holds floats, without reading it."""

    @abstractmethod
    def get(self, key: str) -> Tensor:
        """One tensor, freshly read, in its own dtype (float32 from GGUF)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """What holds every tensor without loss, as they lie on disk; None where that is no float of 16 or 32 bits."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all tensors as they lie on disk."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The transformers tokenizer.

        Raises:
            InputError: there is none, or it cannot be used.
        """

    def words(self) -> Any:
        """What turns a text into tokens, called as :meth:`tokenizer` is, which it may be: the same tokens, sooner."""
        return self.tokenizer()

    @abstractmethod
    def save_sidecars(self, out: Path) -> dict[str, str]:
        """Write config.json (no quantization_config), generation_config.json and the tokenizer; file name -> sha256."""

    def transforms(self, model: PreTrainedModel, places: dict[str, Tensor]) -> list[Any]:
        """transformers' renamings and converters on the way from this checkpoint's names to ``places``, those of
        ``model``."""
        return [] if self._as_named(places) else list(get_model_conversion_mapping(model))

    def _as_named(self, places: dict[str, Tensor]) -> bool:
        """Whether every tensor is called as its parameter is and has its shape, so that there is nothing to rename:
        transformers takes longer to build its table than to read a small model. Not where one has three axes or more,
        which a converter may turn around under the same name."""
        shapes = {name: tuple(place.shape) for name, place in places.items()}
        return all(len(shape := self.shape(key)) < 3 and shapes.get(key) == shape for key in self.keys())

    def fingerprint(self) -> str:
        """Hex sha256 over the weight files' bytes, in the order of ``files``."""
        return digest(*self.files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint from a folder (config.json + safetensors), a ``.gguf`` file, or a hub id ``owner/model``.

    Raises:
        InputError: nothing usable is there; the message says what is and what would work.
        CorruptFileError: a file is truncated or hostile.
        UnsupportedError: a model type that transformers does not know, or weights that are quantized already.
    """
    from fewbit.model.folder import FolderCheckpoint

    text, local = str(path), given.place("the model", path)
    try:
        there, folder = local.exists(), local.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"opening the model {text!r}", str(error)) from error
    if folder:
        return FolderCheckpoint(local)
    if there:
        if local.suffix == ".gguf":
            from fewbit.model.gguf_file import GgufCheckpoint

            return GgufCheckpoint(local)
        raise InputError(f"opening the model {text}", "it is a file, but no .gguf", "a model's folder or a .gguf file")
    if not isinstance(path, Path) and HUB_ID.fullmatch(text) and not Path(text.split("/")[0]).exists():
        return FolderCheckpoint(download(text))
    raise InputError(
        f"opening the model {text!r}",
        "there is no such file or folder",
        "a folder, a .gguf file, or a hub id owner/model",
    )


def download(name: str) -> Path:
    """The folder of the hub's model ``name``, fetched unless it is in the cache already."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:  # the hub's client raises types of its own, of requests, httpx and the system
        raise InputError(
            f"fetching the model {name} from the Hugging Face hub (no local path has that name)",
            first_line(error),
            "a local folder",
        ) from error


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless every entry of ``tensor`` is finite.

    Raises:
        InputError: names the tensor and how many entries are NaN or infinite.
    """
    if not tensor.is_floating_point() or all_finite(tensor):
        return
    found = f"{int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite of {tensor.numel()} weights"
    raise InputError(f"tensor {name}", found, "a checkpoint of finite weights")


def check_layers(config: PretrainedConfig, keys: Iterable[str], path: Path) -> None:
    """Refuse a configuration that asks for more blocks than the checkpoint has numbered modules.

    Building a skeleton takes time and memory per block; weights on disk justify a number of them, a number in a JSON
    file does not.
    """
    numbers = {int(part) for key in keys for part in key.split(".") if part.isdigit() and len(part) < 9}
    text = config.get_text_config()
    asked = max((value for name in LAYER_COUNTS if type(value := getattr(text, name, None)) is int), default=0)
    if asked > max(numbers, default=-1) + 1:
        raise InputError(
            f"reading {path}",
            f"its configuration has {asked} layers, its weights {max(numbers, default=-1) + 1}",
            "a complete checkpoint",
        )
