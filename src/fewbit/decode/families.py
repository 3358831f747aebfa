# SPDX-License-Identifier: Apache-2.0
"""Families that the native runtime knows, as data: how each block departs from Llama's, and the numbers that it takes
from the configuration. Names are paths in transformers' module tree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import UnsupportedError

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}
"""transformers' names of what the gate of an MLP goes through, as ``fewbit_decode.h`` numbers them."""

OWN_ROPES: dict[str, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embeddings that are computed here, and what each is given by."""
ROPES = (*OWN_ROPES, "yarn", "proportional")
"""Those whose frequencies do not change with the length of the text."""
UNTURNED = "unturned"
"""The kind of layers that heed no positions: their rotary embedding turns nothing."""


@dataclass(frozen=True)
class Family:
    """One row.

    * ``types``: values of ``model_type``.
    * ``norms``: of what enters attention, what leaves it, what enters the MLP, what leaves it; None: there is none.
    * ``norm_offset``: added to the weights of norms. ``head_norms``: queries and keys are normed head by head.
    * ``scaled_embedding``: embeddings are multiplied by the root of their width.
    * ``experts``: whether the MLP may be several of which a router chooses. ``normalised``: whether the weights of
      those chosen add up to 1; None: the configuration says.
    * ``stated``: what else than sizes its class in transformers heeds, and so what alone is heeded here: a field that
      came with another family's configuration means nothing. ``config.json`` must say it, so that no default counts.
    * ``gelu``: what it means by an activation of that name.
    """

    types: tuple[str, ...]
    norms: tuple[str, str | None, str, str | None] = ("input_layernorm", None, "post_attention_layernorm", None)
    norm_offset: float = 0.0
    head_norms: bool = False
    scaled_embedding: bool = False
    experts: bool = False
    normalised: bool | None = None
    stated: tuple[str, ...] = ("hidden_act",)
    gelu: str = "gelu"


SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

WINDOWS = ("layer_types", "sliding_window")
GEMMA = ("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping", *WINDOWS)
EXPERTS = ("hidden_act", "num_experts_per_tok")
QWEN_EXPERTS = (*EXPERTS, "sliding_window", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
QWEN_VL_EXPERTS = (*EXPERTS, "decoder_sparse_step", "mlp_only_layers")

FAMILIES: tuple[Family, ...] = (
    Family(("llama",)),
    Family(("mistral",), stated=("hidden_act", "sliding_window")),
    Family(("qwen2", "ministral", "qwen2_vl_text", "qwen2_5_vl_text"), stated=("hidden_act", *WINDOWS)),
    Family(("smollm3",), stated=("hidden_act", "no_rope_layers", *WINDOWS)),
    Family(("qwen3",), head_norms=True, stated=("hidden_act", *WINDOWS)),
    Family(("qwen3_vl_text",), head_norms=True),
    Family(("gemma",), norm_offset=1.0, scaled_embedding=True, gelu="gelu_pytorch_tanh"),
    Family(("gemma2",), SANDWICH, norm_offset=1.0, scaled_embedding=True, stated=(*GEMMA, "attn_logit_softcapping")),
    Family(("gemma3_text",), SANDWICH, norm_offset=1.0, scaled_embedding=True, head_norms=True, stated=GEMMA),
    Family(("mixtral",), experts=True, normalised=True, stated=(*EXPERTS, "sliding_window")),
    Family(("qwen2_moe",), experts=True, stated=(*QWEN_EXPERTS, "layer_types")),
    Family(("qwen3_moe",), experts=True, head_norms=True, stated=QWEN_EXPERTS),
    Family(("qwen3_vl_moe_text",), experts=True, head_norms=True, normalised=True, stated=QWEN_VL_EXPERTS),
)


_HEADS = (("lm_head.", "lm_head."), ("language_model.lm_head.", "lm_head."))
_LLAVA = (("model.language_model.", "model."), ("language_model.model.", "model."), *_HEADS)
_IDEFICS = (("model.text_model.", "model."), *_HEADS)
_OLDER_QWEN = tuple((f"model.{name}.", f"model.{name}.") for name in ("embed_tokens", "layers", "norm"))
_QWEN = (("model.language_model.", "model."), *_OLDER_QWEN, *_HEADS)
TEXT_PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("gemma3", "llava", "mistral3"), _LLAVA),
    **dict.fromkeys(("idefics3", "smolvlm"), _IDEFICS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _QWEN),
}
"""Types of vision-language models whose text goes through a model of a family above, which ``text_config`` describes:
how the names of its arrays begin, in transformers' module tree and in files, and how those of that family alone do.
Qwen's count positions by three numbers a token, each of which turns some pairs of a head (arXiv:2409.12191, section
2.1): where no image is they are equal, and pairs turn as they do by one number."""


def family_of(model_type: Any) -> Family | None:
    return next((family for family in FAMILIES if model_type in family.types), None)


@dataclass(frozen=True)
class Rope:
    """``frequencies``: (pairs,) float32, radians a position; cosines and sines are multiplied by ``scale``."""

    frequencies: Tensor
    scale: float


@dataclass(frozen=True)
class Layer:
    """``window``: positions that a token sees, 0: all. ``rope``: which of the model's. ``experts``: 0 for one MLP."""

    window: int
    rope: int
    experts: int


@dataclass(frozen=True)
class Shape:
    """What a configuration says, in the terms of ``fewbit_decode.h``; caps are 0 where there are none."""

    family: Family
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    experts_per_token: int
    normalised: bool
    eps: float
    query_scale: float
    attention_cap: float
    logit_cap: float
    embedding_scale: float
    activation: int
    ropes: tuple[Rope, ...]
    layers: tuple[Layer, ...]


def shape_of(config: Any) -> Shape:
    """What the native runtime must know of a model of configuration ``config``.

    Raises:
        UnsupportedError: an unknown family, or something in it that the runtime cannot do.
    """
    kind = config.model_type
    asked = f"the native runtime for a {kind} model"
    family = family_of(kind)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.types)
        raise UnsupportedError(asked, "it does not know this family", f"it knows {known}")
    said = {name: _get(config, name) for name in family.stated}
    activation = said.get("hidden_activation") or said.get("hidden_act")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(asked, f"the activation {activation!r}", f"one of {', '.join(ACTIVATIONS)}")
    if _get(config, "use_bidirectional_attention"):
        raise UnsupportedError(asked, "its attention looks ahead", "causal attention")
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = _get(config, "head_dim") or hidden // heads
    kinds, ropes = _ropes(config, said, head_dim, asked)
    normalised = bool(said.get("norm_topk_prob")) if family.normalised is None else family.normalised
    # The embedding's scale has been rounded to its dtype when the model was trained.
    scale = torch.tensor(hidden**0.5 if family.scaled_embedding else 1.0, dtype=_dtype(config)).item()
    return Shape(
        family,
        hidden,
        heads,
        _get(config, "num_key_value_heads") or heads,
        head_dim,
        config.vocab_size,
        config.max_position_embeddings,
        said.get("num_experts_per_tok") or 0,
        normalised,
        config.rms_norm_eps,
        (said.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        said.get("attn_logit_softcapping") or 0.0,
        said.get("final_logit_softcapping") or 0.0,
        scale,
        ACTIVATIONS[family.gelu if activation == "gelu" else activation],
        ropes,
        tuple(_layer(said, _experts(config, family), layer, kinds) for layer in range(config.num_hidden_layers)),
    )


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _dtype(config: Any) -> torch.dtype:
    named = _get(config, "dtype") or torch.float32
    return named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."))


def _experts(config: Any, family: Family) -> int:
    return (_get(config, "num_local_experts") or _get(config, "num_experts") or 0) if family.experts else 0


def _layer(said: dict[str, Any], experts: int, layer: int, kinds: dict[str | None, int]) -> Layer:
    types: Any = said.get("layer_types")
    sliding = types[layer] == "sliding_attention" if types else True
    window = (said.get("sliding_window") or 0) if sliding else 0
    turned = (said.get("no_rope_layers") or {layer: True})[layer]
    rope = kinds[types[layer] if None not in kinds else None] if turned else kinds[UNTURNED]
    every, plain = said.get("decoder_sparse_step") or 1, said.get("mlp_only_layers") or ()
    return Layer(window, rope, experts if (layer + 1) % every == 0 and layer not in plain else 0)


def _ropes(
    config: Any, said: dict[str, Any], head_dim: int, asked: str
) -> tuple[dict[str | None, int], tuple[Rope, ...]]:
    """Which rotary embedding each kind of layer has (None: any), and the embeddings."""
    parameters = config.rope_parameters
    named: dict[str | None, Any] = {None: parameters} if "rope_type" in parameters else dict(parameters)
    ropes = [_rope(config, rope, kind, head_dim, asked) for kind, rope in named.items()]
    kinds = {kind: place for place, kind in enumerate(named)}
    if not all(said.get("no_rope_layers") or ()):
        kinds[UNTURNED] = len(ropes)
        ropes.append(Rope(torch.zeros(1, dtype=torch.float32), 1.0))
    return kinds, tuple(ropes)


def _rope(config: Any, parameters: dict[str, Any], layer_type: str | None, head_dim: int, asked: str) -> Rope:
    kind = parameters["rope_type"]
    if kind not in ROPES:
        raise UnsupportedError(asked, f"rotary embeddings of type {kind!r}", f"one of {', '.join(ROPES)}")
    # Classes of transformers that all these families have either ignore it or fail, but for "proportional".
    if kind != "proportional" and parameters.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedError(asked, "rotary embeddings of a part of each head", "of whole heads")
    if kind in OWN_ROPES:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return Rope(_slowed(1.0 / (parameters["rope_theta"] ** exponents), parameters), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=layer_type)
    return Rope(frequencies.float().contiguous(), float(scale))


def _slowed(frequencies: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Frequencies for a longer context: all divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595), or only those
    that turn fewer than ``low_freq_factor`` times in the original context, those that turn more than
    ``high_freq_factor`` times staying as they are, with a line between (Llama 3.1, arXiv:2407.21783)."""
    if parameters["rope_type"] == "default":
        return frequencies
    kept = torch.zeros_like(frequencies)
    if parameters["rope_type"] == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    slowed: Tensor = frequencies * (kept + (1 - kept) / parameters["factor"])
    return slowed
