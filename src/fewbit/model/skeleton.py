# SPDX-License-Identifier: Apache-2.0
"""A model without its weights: every parameter on the meta device, every computed buffer real."""

from __future__ import annotations

import copy

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fewbit.errors import InputError, UnsupportedError
from fewbit.model.classes import class_of

LARGEST_BUFFERS = 1 << 28
"""Bytes of computed buffers (rotary frequencies and the like) that a configuration may ask for."""


def build(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model that ``config`` describes, float32, in eval mode, nothing allocated but small buffers.

    Raises:
        UnsupportedError: transformers has no causal language model of this type.
        InputError: the configuration contradicts itself.
    """
    config = copy.deepcopy(config)
    config.use_cache = False
    asked = f"building a {config.model_type} model"
    try:
        model = _empty(config, "sdpa")
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedError(
                asked,
                "transformers has no causal language model of this type",
                "a decoder such as Llama, Qwen or Gemma",
            ) from error
        try:
            model = _empty(config, "eager")  # the only attention that some families have
        except Exception:
            raise InputError(asked, f"its configuration cannot be used: {error}") from error
    except (TypeError, AttributeError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise InputError(asked, f"its configuration cannot be used: {error}") from error
    return _with_buffers(model)


def _empty(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The model on the meta device, buffers too."""
    with torch.device("meta"):
        made: PreTrainedModel = class_of(config).from_config(
            config, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager"
        )
    return made


def _with_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Compute the buffers that no checkpoint holds, the way transformers does after loading."""
    names = [name for name, _ in model.named_non_persistent_buffers()]
    total = sum(model.get_buffer(name).nbytes for name in names)
    if total > LARGEST_BUFFERS:
        raise InputError(f"building a {model.config.model_type} model", f"its buffers would take {total:,} bytes")
    owners = {name.rpartition(".")[0] for name in names}
    for name in names:
        path, _, leaf = name.rpartition(".")
        buffer = model.get_buffer(name)
        model.get_submodule(path)._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    parents = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    with torch.no_grad():
        for owner in sorted(owners):
            nearest = max((path for path in parents if not path or (owner + ".").startswith(path + ".")), key=len)
            parents[nearest]._init_weights(model.get_submodule(owner))
    return model.requires_grad_(False).eval()
