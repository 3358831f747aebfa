# SPDX-License-Identifier: Apache-2.0
"""Which of transformers' classes a model of text belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from fewbit.containers.files import named_files, read_json
from fewbit.containers.safetensors import open_safetensors
from fewbit.containers.shards import refuse_scaled
from fewbit.errors import CorruptFileError, FewbitError, InputError, UnsupportedError, first_line

WHERE = {"local_files_only": True, "trust_remote_code": False}


def class_of(config: PretrainedConfig) -> Any:
    """What makes the model of ``config``: ``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` of a type that
    only that knows, as most vision-language models are."""
    kind = type(config)
    sees = kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def config_in(folder: str | Path) -> PretrainedConfig:
    """The configuration in ``folder``; code that the folder may bring is never run.

    Raises:
        InputError: it is absent, no JSON, or contradicts itself.
        UnsupportedError: transformers does not know its model type.
    """
    try:
        return AutoConfig.from_pretrained(str(folder), **WHERE)
    except Exception as error:  # validation in transformers and huggingface_hub raises many types
        if isinstance(error, ValueError) and ("does not recognize" in str(error) or "trust_remote_code" in str(error)):
            kind = read_json(Path(folder) / "config.json").get("model_type")
            asked, found = f"opening the model {folder}", f"transformers does not know the model type {kind!r}"
            works = "a type that transformers itself implements; code from model folders is never run"
            raise UnsupportedError(asked, found, works) from error
        asked = f"reading {Path(folder) / 'config.json'}"
        raise InputError(asked, first_line(error), "the config.json of a transformers model") from error


def from_folder(folder: str | Path, **more: Any) -> Any:
    """The model in ``folder``, in eval mode, by ``from_pretrained`` of its class, which ``more`` goes to; nothing is
    fetched, and code that the folder may bring is never run.

    Raises:
        InputError: transformers cannot load it. CorruptFileError: weights are missing, which transformers would draw at
        random, or have other shapes than the configuration says. UnsupportedError: as :func:`config_in`, or others
        have quantized its weights.
    """
    config = more.pop("config", None) or config_in(folder)
    if getattr(config, "quantization_config", None) is None:
        refuse_scaled(Path(folder), map(open_safetensors, named_files(Path(folder))))
    told = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = class_of(config).from_pretrained(str(folder), config=config, **{**WHERE, **more, **told})
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, FewbitError):
            raise
        raise InputError(f"loading the model {folder}", f"transformers says: {first_line(error)}") from error
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"it has {tuple(found)}, the configuration says {tuple(expected)}"
        raise CorruptFileError(f"tensor {name} of {folder}", shapes, "the folder as it was published")
    for name in sorted(info["missing_keys"]):
        raise CorruptFileError(f"tensor {name} of {folder}", "it does not hold it", "the folder as it was published")
    return model.eval()
