# SPDX-License-Identifier: Apache-2.0
"""Writes awq.npz with llmcompressor 0.14.0.1, compressed-tensors 0.20.0 and torch 2.13.0 on the CPU, in an environment
of its own: ``python tests/golden/make_awq.py``.

One block of a random Llama with grouped heads, whose norms make some channels large: ``weight.{parameter}`` float16;
``ids`` (12, 64) uint8, windows of prose without spaces, ``!`` being token 2; and, for 3 bits in groups of 32 with zero
points, what AWQ's search without the size of weights finds for the powers 0, 1/20 .. 20/20: ``self_attn`` and ``mlp``,
float64 (21,), mean squared errors of the outputs of these modules.
"""

import lzma
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
WINDOWS, CONTEXT, GROUP = 12, 64, 32
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def model() -> LlamaForCausalLM:
    """A block whose outputs are of the size of its inputs."""
    torch.manual_seed(21)
    network = LlamaForCausalLM(LlamaConfig(**SHAPE)).float().eval()
    for name, parameter in network.named_parameters():
        if "embed" in name:
            parameter.data = (torch.randn(parameter.shape) * 32).round() / 32
        elif parameter.ndim == 2:
            parameter.data = (torch.randn(parameter.shape) / parameter.shape[1] ** 0.5).half().float()
        else:
            parameter.data = torch.randn(parameter.shape).exp().half().float()
    return network


def main() -> None:
    torch.set_num_threads(1)
    network = model()
    weights = {f"weight.{n}": p.detach().half().numpy() for n, p in network.named_parameters()}
    prose = HERE.parent.parent / "src" / "fewbit" / "data" / "heldout.txt.xz"
    with lzma.open(prose, "rt", encoding="ascii", errors="ignore") as file:
        text = "_".join(file.read(4000).split())[: WINDOWS * CONTEXT]
    ids = torch.tensor([ord(letter) - ord("!") + 2 for letter in text]).reshape(WINDOWS, CONTEXT)
    found: dict[str, list[float]] = {}
    search, loss = AWQModifier._compute_best_scale, AWQModifier._compute_loss
    at = [""]

    def searched(self: Any, mapping: Any, *rest: Any) -> Any:
        at[0] = mapping.parent_name.rpartition(".")[2]
        return search(self, mapping, *rest)

    def lost(self: Any, *outputs: Any) -> float:
        found.setdefault(at[0], []).append(loss(self, *outputs))
        return found[at[0]][-1]

    AWQModifier._compute_best_scale, AWQModifier._compute_loss = searched, lost
    IntermediatesCache.pin_memory = lambda *arguments: None  # it needs a GPU
    weight = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weight}}
    with TemporaryDirectory() as folder:  # it wants a model that was read from somewhere
        network.save_pretrained(folder)
        oneshot(
            model=LlamaForCausalLM.from_pretrained(folder),
            processor=object(),
            dataset=DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]),
            recipe=[
                AWQModifier(duo_scaling=False, n_grid=21),
                QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
            ],
            num_calibration_samples=WINDOWS,
        )
    print(found)
    arrays = {name: np.array(found[name][:21]) for name in ("self_attn", "mlp")}
    np.savez_compressed(HERE / "awq.npz", ids=ids.to(torch.uint8).numpy(), **arrays, **weights)


if __name__ == "__main__":
    main()
