# SPDX-License-Identifier: Apache-2.0
"""What make_awq.py and make_autoround.py quantize: one block of a random Llama, and windows of prose for it."""

import lzma
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
WINDOWS, CONTEXT = 12, 64
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def block(seed: int, heads: int, wide: int, weight: Callable[[Tensor], Tensor]) -> LlamaForCausalLM:
    """Drawn with ``seed``: two of ``heads`` a head of keys, an MLP of ``wide``; parameters of blocks are ``weight`` of
    themselves, in float16."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "intermediate_size": wide, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    network = LlamaForCausalLM(LlamaConfig(**shape)).float().eval()
    for name, parameter in network.named_parameters():
        if "embed" in name:
            parameter.data = (torch.randn(parameter.shape) * 32).round() / 32
        else:
            parameter.data = weight(parameter.data).half().float()
    return network


def windows() -> Tensor:
    """(WINDOWS, CONTEXT): prose without spaces, ``!`` being token 2."""
    prose = HERE.parent.parent / "src" / "fewbit" / "data" / "heldout.txt.xz"
    with lzma.open(prose, "rt", encoding="ascii", errors="ignore") as file:
        text = "_".join(file.read(4000).split())[: WINDOWS * CONTEXT]
    return torch.tensor([ord(letter) - ord("!") + 2 for letter in text]).reshape(WINDOWS, CONTEXT)
