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
    # Gemma 3 and other models with eyes: their language half.
    Family("model.language_model.layers", ("embed_tokens",), ("norm", "final_layernorm")),
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
