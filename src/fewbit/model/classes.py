# SPDX-License-Identifier: Apache-2.0
"""Which of transformers' classes a model of text belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)


def class_of(config: PretrainedConfig) -> Any:
    """What makes the model of ``config``: ``AutoModelForCausalLM``, or ``AutoModelForImageTextToText`` of a type that
    only that knows, as most vision-language models are."""
    kind = type(config)
    sees = kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def from_folder(folder: str | Path, **more: Any) -> Any:
    """The model in ``folder``, in eval mode, by ``from_pretrained`` of its class, which ``more`` goes to; nothing is
    fetched, and code that the folder may bring is never run."""
    where = {"local_files_only": True, "trust_remote_code": False}
    found = more.get("config") or AutoConfig.from_pretrained(str(folder), **where)
    return class_of(found).from_pretrained(str(folder), **{**where, **more}).eval()
