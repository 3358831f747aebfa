# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of many families, made by transformers itself and saved as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

VOCABULARY = 67
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = dict(LLAMA, num_experts_per_tok=2, moe_intermediate_size=24)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", dict(LLAMA, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("qwen3", dict(LLAMA, tie_word_embeddings=True)),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", dict(LLAMA, sliding_window=4, query_pre_attn_scalar=8, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", dict(LLAMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    "mistral": ("mistral", dict(LLAMA, sliding_window=4)),
    "ministral": ("ministral", dict(LLAMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    "smollm3": ("smollm3", dict(LLAMA, no_rope_layers=[1, 0])),
    "phi": ("phi", dict(LLAMA, num_key_value_heads=4)),
    "phi3": ("phi3", LLAMA),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", dict(LLAMA, num_key_value_heads=4)),
    "opt": ("opt", dict(LLAMA, ffn_dim=48, word_embed_proj_dim=16)),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gptj": (
        "gptj",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "olmo2": ("olmo2", LLAMA),
    "granite": ("granite", dict(LLAMA, logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0)),
    "cohere": ("cohere", dict(LLAMA, logit_scale=0.5)),
    "stablelm": ("stablelm", LLAMA),
    "starcoder2": ("starcoder2", LLAMA),
    "mixtral": ("mixtral", dict(MOE, num_local_experts=4)),
    "qwen2-moe": ("qwen2_moe", dict(MOE, num_experts=4, shared_expert_intermediate_size=40)),
    "qwen3-moe": ("qwen3_moe", dict(MOE, num_experts=4)),
    "olmoe": ("olmoe", dict(MOE, num_experts=4)),
    "gpt-oss": ("gpt_oss", dict(MOE, num_local_experts=4, sliding_window=4)),
    "deepseek-v3": (
        "deepseek_v3",
        dict(
            MOE,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),
}


_SEEN: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def _vision_language(kind: str, text: str, sees: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """A vision-language model: what it sees with, and the family of a row above that its text goes through."""
    of_text = {name: value for name, value in FAMILIES[text][1].items() if name != "vocab_size"}
    vision = {**_SEEN, "model_type": sees} if sees else _SEEN
    return kind, {"text_config": {**of_text, "model_type": FAMILIES[text][0]}, "vision_config": vision, **more}


def _qwen_vl(kind: str, text: dict[str, Any], **sees: Any) -> tuple[str, dict[str, Any]]:
    """One of Qwen's, whose text has three positions a token."""
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    tokens = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id"), (60, 61, 62), strict=True))
    return kind, {"text_config": dict(text, rope_parameters=rope), "vision_config": {**sizes, **sees}, **tokens}


VISION_LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3-vision": _vision_language(
        "gemma3", "gemma3", "siglip_vision_model", mm_tokens_per_image=4, image_token_index=60
    ),
    "llava": _vision_language("llava", "llama", "clip_vision_model", image_token_index=60, vision_feature_layer=-1),
    "mistral3": _vision_language("mistral3", "mistral", "pixtral", image_token_index=60),
    "idefics3": _vision_language("idefics3", "llama", "", image_token_id=60, scale_factor=2),
    "smolvlm": _vision_language("smolvlm", "llama", "", image_token_id=60, scale_factor=2),
    "qwen2-vl": _qwen_vl("qwen2_vl", LLAMA, embed_dim=16, hidden_size=32),
    "qwen2.5-vl": _qwen_vl("qwen2_5_vl", LLAMA, out_hidden_size=32, fullatt_block_indexes=[0], window_size=28),
    "qwen3-vl": _qwen_vl(
        "qwen3_vl", LLAMA, out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16
    ),
    "qwen3-vl-moe": _qwen_vl(
        "qwen3_vl_moe",
        dict(MOE, num_experts=4),
        out_hidden_size=32,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    ),
}


def make(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Save a tiny random model of ``family`` under ``folder`` and return it, float32, in eval mode; ``changes``: of its
    configuration, of a vision-language model of the text's."""
    kind, options = {**FAMILIES, **VISION_LANGUAGE}[family]
    if family in VISION_LANGUAGE:
        changes = {"text_config": {**options["text_config"], **changes}}
    config = AutoConfig.for_model(kind, **{**options, **changes})
    build = AutoModelForImageTextToText if family in VISION_LANGUAGE else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build.from_config(config, dtype=torch.float32).eval()
        for _name, value in model.named_parameters():
            # norms and biases start out as ones and zeros, which would hide a lost one; so do some projectors
            if value.ndim == 1 or not value.any():
                value.data = value.data + 0.1 * torch.randn(value.shape)
    model.save_pretrained(folder)
    return model


def picture(family: str) -> dict[str, torch.Tensor]:
    """What a vision-language model of ``family`` is called with for a text that a random image is in."""
    generator = torch.Generator().manual_seed(5)
    if family.startswith("qwen"):
        patches = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
        more = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        image = torch.randn(1, 3, 56, 56, generator=generator)
        more = {"pixel_values": image[None] if family in ("idefics3", "smolvlm") else image}
        more |= {"image_sizes": torch.tensor([[56, 56]])} if family == "mistral3" else {}
    text = torch.tensor([[5, 9, 62, *[60] * (16 if family == "llava" else 4), 7, 11, 30, 4]])
    kind = "token_type_ids" if family == "gemma3-vision" else "mm_token_type_ids"
    types = {kind: (text == 60).long()} if family == "gemma3-vision" or family.startswith("qwen") else {}
    return {"input_ids": text, **types, **more}


def ids(batch: int = 2, tokens: int = 13, seed: int = 1) -> torch.Tensor:
    """(batch, tokens) random token ids."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
