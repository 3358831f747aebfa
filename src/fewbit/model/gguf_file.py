# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a checkpoint: transformers' names and orders, one tensor decoded at a time.

transformers reads a GGUF file into memory as a whole. Its tables of names and its inverse permutations are used here,
and its reader only for configuration and tokenizer, after :func:`fewbit.containers.gguf.open_gguf` checked the file.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from fewbit.containers.files import write_bytes, write_json
from fewbit.containers.gguf import open_gguf, outline
from fewbit.errors import InputError, UnsupportedError, first_line
from fewbit.model.checkpoint import Checkpoint, check_layers
from fewbit.model.skeleton import build

TOKENS = "tokenizer.ggml.tokens"


class GgufCheckpoint(Checkpoint):
    """Final; see :func:`fewbit.model.checkpoint.open_checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path, self.files, self.ignored = path, [path], []
        self._file = open_gguf(path)
        kind = self._file.metadata.get("general.architecture")
        if not isinstance(kind, str):
            raise InputError(f"reading {path}", "it names no general.architecture", "a GGUF file of a language model")
        self.config = self._config(kind)
        check_layers(self.config, self._file.tensors, path)
        model = build(self.config)
        self.architecture = type(model).__name__
        self._places = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=self.config.to_dict())
        self._sources: dict[str, list[str]] = {}
        if is_gguf_arch_supported(kind):
            self._names: dict[str, str] = {}
            self._sources = {name: [name] for name in self._file.tensors}
            return
        try:
            self._names = get_gguf_hf_weights_map(_outline(model), self._processor)
        except NotImplementedError as error:
            raise UnsupportedError(f"reading {path}", f"the names of {kind} are unknown: {error}") from error
        for name in self._file.tensors:
            place = self._place(name)
            if place in self._places:
                self._sources.setdefault(place, []).append(name)
            else:
                self.ignored.append(name)

    def transforms(self, model: PreTrainedModel, places: dict[str, Tensor]) -> list[Any]:
        if self._names:
            return super().transforms(model, places)
        return list(get_gguf_conversion_mapping(str(self._file.metadata["general.architecture"]), model.config))

    def _place(self, name: str) -> str:
        """The parameter that a tensor belongs to, or the empty string. Stacked experts are mapped without a suffix."""
        return self._names.get(name) or self._names.get(name.removesuffix(".weight"), "")

    def _config(self, kind: str) -> Any:
        try:
            with self._outlined():
                return AutoConfig.from_pretrained(
                    str(self.path.parent), gguf_file=self.path.name, local_files_only=True
                )
        except Exception as error:  # the reader in transformers checks little and raises what comes
            if isinstance(error, ValueError) and "not supported" in str(error):
                raise UnsupportedError(
                    f"opening the model {self.path}", f"transformers does not read GGUF of architecture {kind!r}"
                ) from error
            raise InputError(
                f"the configuration in {self.path}", first_line(error), "a GGUF file of a language model"
            ) from error

    @contextmanager
    def _outlined(self) -> Iterator[None]:
        """Meanwhile transformers takes the configuration from an outline of this file.

        For most architectures it asks a reader that walks over the vocabulary string by string, for the configuration
        and once more for the tokenizer's class: 7 s each for 49152 tokens. A version that does not ask that reader, or
        got hold of it before, does what it always does.
        """

        def described(path: Any, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
            if return_tensors or Path(path) != self.path:
                return dict(read(path, return_tensors, **options))
            known: dict[str, int] = {}
            more: dict[str, int] = {}
            if TOKENS in self._file.arrays:
                known["vocab_size"] = self._file.arrays[TOKENS][1]
                if (key := f"{self._file.metadata['general.architecture']}.vocab_size") not in self._file.metadata:
                    more[key] = known["vocab_size"]
            with tempfile.TemporaryDirectory() as folder:
                outline(self._file, short := Path(folder) / "outline.gguf", more)
                return {"config": known | read(short)["config"]}

        read = modeling_gguf_pytorch_utils.load_gguf_checkpoint
        modeling_gguf_pytorch_utils.load_gguf_checkpoint = described
        try:
            yield
        finally:
            modeling_gguf_pytorch_utils.load_gguf_checkpoint = read

    def keys(self) -> list[str]:
        return list(self._sources)

    def shape(self, key: str) -> tuple[int, ...]:
        if key not in self._sources:
            raise InputError(f"tensor {key} of {self.path}", "there is none of that name")
        stored = [self._file.tensors[name].shape for name in self._sources[key]]
        shape = self._places.get(key, stored[0])
        # Stacked experts come in two tensors, and some vectors without their axes of length one.
        return shape if sum(map(math.prod, stored)) == math.prod(shape) else stored[0]

    def floating(self, key: str) -> bool:
        return True

    def get(self, key: str) -> Tensor:
        if key not in self._sources:
            raise InputError(f"tensor {key} of {self.path}", "there is none of that name")
        if not self._names:
            return self._file.get(self._sources[key][0])
        parts: dict[str, Any] = {"tensors": {}}
        value: Tensor | None = None
        for name in self._sources[key]:
            made = self._processor.process(
                weights=self._file.get(name).numpy(),
                name=name,
                tensor_key_mapping=self._names,
                parsed_parameters=parts,
            )
            # Processors either hand back the values or, for stacked experts, put them into ``parts`` themselves.
            value = parts["tensors"][key] if made.name is None else torch.from_numpy(np.ascontiguousarray(made.weights))
        assert value is not None
        return value

    @property
    def dtype(self) -> torch.dtype | None:
        return None

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._file.tensors.values())

    def tokenizer(self) -> Any:
        if TOKENS not in self._file.arrays:
            raise InputError(f"the tokenizer of {self.path}", "the file has none", "a GGUF file with its vocabulary")
        try:
            with self._outlined():
                return AutoTokenizer.from_pretrained(
                    str(self.path.parent), gguf_file=self.path.name, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise InputError(
                f"the tokenizer of {self.path}", first_line(error), "a GGUF file with a whole vocabulary"
            ) from error

    def save_sidecars(self, out: Path) -> dict[str, str]:
        config = self.config.to_dict()
        for name in ("quantization_config", "_name_or_path"):
            config.pop(name, None)
        config["architectures"] = [self.architecture]
        written = {"config.json": write_json(out / "config.json", config)}
        generation = GenerationConfig.from_model_config(self.config).to_diff_dict()
        written["generation_config.json"] = write_json(out / "generation_config.json", generation)
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer().save_pretrained(folder)
            for path in sorted(Path(folder).iterdir()):
                written[path.name] = write_bytes(out / path.name, path.read_bytes())
        return written


@dataclass(frozen=True)
class _Outline:
    """What transformers' name table asks of a model. The table is made anew for every module below a model that it is
    given, which takes seconds; below this one there is only the base model, whose own names some files use."""

    config: Any
    state_dict: Callable[[], dict[str, Tensor]]
    below: tuple[tuple[str, _Outline], ...]

    def named_children(self) -> tuple[tuple[str, _Outline], ...]:
        return self.below


def _outline(model: PreTrainedModel) -> _Outline:
    base = model.base_model
    below = () if base is model else ((model.base_model_prefix, _Outline(model.config, base.state_dict, ())),)
    return _Outline(model.config, model.state_dict, below)
