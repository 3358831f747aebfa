# SPDX-License-Identifier: Apache-2.0
"""Model families, as data. What is known about an architecture by name is in this file and nowhere else.

A decoder is: modules that make the first hidden state (``before``), a list of blocks, modules that follow the last
block (``after``), and the head. Names below are paths in transformers' module tree.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg", "mlp_gate", "router_proj"})
"""Modules that choose experts. Their error changes which experts run, and they are small: kept in float."""

EXPERTS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Three-dimensional parameters (experts, ., .) of these names are stacked matrices, one an expert."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names under which a configuration gives its number of blocks."""


@dataclass(frozen=True)
class Family:
    """One row: where the parts of a decoder lie. A name that a model does not have is skipped.

    ``tuples``: blocks return a tuple whose first entry is the hidden state.
    """

    blocks: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    tuples: bool = False


FAMILIES: tuple[Family, ...] = (
    # Llama, Qwen, Gemma, Mistral, Mixtral, Phi, Phi-3, Granite, OLMo, StableLM, Starcoder2, Cohere, GLM, DeepSeek, ...
    Family("model.layers", ("embed_tokens",), ("norm", "final_layernorm", "layer_norm", "embedding_norm")),
    # Gemma 3, LLaVA, Mistral 3, Qwen2-VL and other vision-language models: their language model.
    Family("model.language_model.layers", ("embed_tokens",), ("norm", "final_layernorm")),
    # Idefics 3, SmolVLM.
    Family("model.text_model.layers", ("embed_tokens",), ("norm",)),
    # GPT-2, GPT-BigCode, GPT-Neo.
    Family("transformer.h", ("wte", "wpe"), ("ln_f",)),
    # Bloom, Falcon.
    Family("transformer.h", ("word_embeddings", "word_embeddings_layernorm"), ("ln_f",), tuples=True),
    # GPT-NeoX, Pythia.
    Family("gpt_neox.layers", ("embed_in",), ("final_layer_norm",)),
    # OPT.
    Family(
        "model.decoder.layers", ("embed_tokens", "embed_positions", "project_in"), ("final_layer_norm", "project_out")
    ),
    # MPT.
    Family("transformer.blocks", ("wte", "wpe"), ("norm_f",), tuples=True),
)

TUPLE_BLOCKS = frozenset({"gptj", "codegen", "gpt_neo"})
"""Model types whose blocks return tuples although their row's do not."""


@dataclass(frozen=True)
class Residual:
    """How the blocks of models of ``types`` read and write the residual stream: what a rotation of it must know.

    Paths below a block; those that a model does not have are skipped, and matrices of a block that no row names are
    refused.

    * ``reads``: norms, and the matrices that read what each gives. ``writes``: matrices whose outputs are added.
    * ``value`` and ``output``: the matrix that makes values head by head, and the one that reads their mixtures.
    * ``down``: matrices that read what is inside of an MLP.
    * ``offset``: added to the weights of norms. ``centred``: norms subtract the mean (LayerNorm).
    * ``inner``: norms within a head or across heads, which no rotation reaches.
    """

    types: tuple[str, ...]
    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]
    value: str | None
    output: str
    down: tuple[str, ...]
    offset: float = 0.0
    centred: bool = False
    inner: tuple[str, ...] = ("self_attn.q_norm", "self_attn.k_norm")


_QKV = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv"))
_MLP = tuple(
    f"mlp.{name}"
    for name in (
        *("gate_proj", "up_proj", "gate_up_proj", "c_fc"),
        *("gate", "experts.gate_up_proj"),
        *("shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj"),
    )
)
_LLAMA_READS = (("input_layernorm", _QKV), ("post_attention_layernorm", _MLP))
_LLAMA_DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.shared_expert.down_proj")
_LLAMA_WRITES = ("self_attn.o_proj", *_LLAMA_DOWN, "mlp.experts.down_proj")
_LLAMA = (_LLAMA_READS, _LLAMA_WRITES, "self_attn.v_proj", "self_attn.o_proj", _LLAMA_DOWN)

RESIDUALS: tuple[Residual, ...] = (
    Residual(("llama", "mistral", "qwen2", "qwen3", "phi3", "granite"), *_LLAMA),
    Residual(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), *_LLAMA),
    Residual(("gemma",), *_LLAMA, offset=1.0),
    Residual(("starcoder2",), *_LLAMA, centred=True),
    Residual(
        ("gpt2",),
        (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
        ("attn.c_proj", "mlp.c_proj"),
        None,
        "attn.c_proj",
        ("mlp.c_proj",),
        centred=True,
    ),
    Residual(
        ("opt",),
        (("self_attn_layer_norm", _QKV), ("final_layer_norm", ("fc1",))),
        ("self_attn.out_proj", "fc2"),
        "self_attn.v_proj",
        "self_attn.out_proj",
        ("fc2",),
        centred=True,
    ),
)

_AFTER = "it norms what is added to the residual stream, and the weights of those norms stand where a rotation would"
_PARALLEL = "its attention and MLP read the residual stream side by side, which no row of RESIDUALS describes"

UNROTATABLE: dict[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "olmo2"), _AFTER),
    **dict.fromkeys(("phi", "falcon", "gpt_neox", "gptj", "codegen", "cohere", "stablelm"), _PARALLEL),
}
"""Why the residual streams of models of these types cannot be rotated."""
