# SPDX-License-Identifier: Apache-2.0
"""A folder's configuration. Where ``config.json`` states all that :func:`fewbit.decode.families.shape_of` asks for, as
what transformers writes does, it is taken as it is; else transformers fills in its defaults, which takes seconds to
import."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fewbit.containers.files import read_json
from fewbit.decode.families import OWN_ROPES, TEXT_PARTS, family_of

COUNTS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "num_hidden_layers",
)
LISTS = ("layer_types", "no_rope_layers")
"""One entry a layer; null leaves it to defaults that differ by family."""
EXPERTS = ("num_local_experts", "num_experts")
DTYPES = (None, "float32", "bfloat16", "float16")


def config_of(folder: Path) -> Any:
    """An object with the configuration's values as attributes. Code that the folder may bring is never run.

    Raises:
        InputError, CorruptFileError: it is absent, no JSON, or transformers refuses it. UnsupportedError: transformers
            does not know its type.
    """
    whole = read_json(folder / "config.json")
    stated = whole.get("text_config") if has_text_part(whole) else None
    found = stated if isinstance(stated, dict) else whole  # older ones hold all in one, or leave it to defaults
    dtypes = (each.get(name) for each in (found, whole) for name in ("dtype", "torch_dtype"))
    found = {**found, "dtype": next((dtype for dtype in dtypes if dtype is not None), None)}
    if _whole(found):
        return SimpleNamespace(**found)
    from fewbit.model.classes import config_in

    config: Any = config_in(folder)
    if has_text_part(whole):
        config = config.get_text_config()
        config.dtype = found["dtype"]
    return config


def is_tied(folder: Path) -> bool:
    """Whether the model has its embedding for a head, as its class in transformers takes the configuration."""
    whole = read_json(folder / "config.json")
    text = whole.get("text_config")
    stated = whole.get("tie_word_embeddings")
    if stated is None:  # a default, which differs by class
        from fewbit.model.classes import config_in

        return bool(config_in(folder).tie_word_embeddings)
    return bool(stated or (isinstance(text, dict) and text.get("tie_word_embeddings")))


def has_text_part(config: dict[str, Any]) -> bool:
    """Whether the model of this ``config.json`` is one of :data:`TEXT_PARTS`."""
    return config.get("model_type") in TEXT_PARTS


def _whole(found: dict[str, Any]) -> bool:
    """Whether nothing is left to defaults, and everything is of the type that it must have."""
    family = family_of(found.get("model_type"))
    if family is None or any(name not in found for name in family.stated):
        return False
    epsilon, lists = found.get("rms_norm_eps"), [found.get(name) for name in LISTS]
    return (
        all(type(found.get(name)) is int and found[name] > 0 for name in COUNTS)
        and type(epsilon) is float
        and found.get("dtype") in DTYPES
        and all(each is None or (isinstance(each, list) and len(each) == found["num_hidden_layers"]) for each in lists)
        and not ("no_rope_layers" in family.stated and None in lists)
        and (not found.get("sliding_window") or found.get("use_sliding_window", True) is True)
        and (not family.experts or any(type(found.get(name)) is int for name in EXPERTS))
        and _whole_ropes(found.get("rope_parameters"))
        and found.get("rope_scaling") is None  # how it was called: transformers lets it win
    )


def _whole_ropes(found: Any) -> bool:
    if not isinstance(found, dict) or not found:
        return False
    each = [found] if "rope_type" in found else list(found.values())
    return all(
        isinstance(rope, dict)
        and rope.get("rope_type") in OWN_ROPES
        and all(type(rope.get(name)) in (int, float) and rope[name] > 0 for name in OWN_ROPES[rope["rope_type"]])
        for rope in each
    )
