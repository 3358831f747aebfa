# SPDX-License-Identifier: Apache-2.0
"""Writes awq.npz with llmcompressor 0.14.0.1, compressed-tensors 0.20.0 and torch 2.13.0 on the CPU, in an environment
of its own: ``python tests/golden/make_awq.py``.

One block of a random Llama with grouped heads, whose norms make some channels large: ``weight.{parameter}`` float16;
``ids`` (12, 64) uint8, windows of prose without spaces, ``!`` being token 2; and, for 3 bits in groups of 32 with zero
points, what AWQ's search without the size of weights finds for the powers 0, 1/20 .. 20/20: ``self_attn`` and ``mlp``,
float64 (21,), mean squared errors of the outputs of these modules.
"""

from tempfile import TemporaryDirectory
from typing import Any

import llama
import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

GROUP = 32


def drawn(values: Tensor) -> Tensor:
    """Of a matrix so that outputs are of the size of inputs; of a norm so that some channels are large."""
    values = torch.randn(values.shape)
    return values / values.shape[1] ** 0.5 if values.ndim == 2 else values.exp()


def main() -> None:
    torch.set_num_threads(1)
    network, ids = llama.block(21, heads=4, wide=128, weight=drawn), llama.windows()
    weights = {f"weight.{n}": p.detach().half().numpy() for n, p in network.named_parameters()}
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
            num_calibration_samples=llama.WINDOWS,
        )
    print(found)
    arrays = {name: np.array(found[name][:21]) for name in ("self_attn", "mlp")}
    np.savez_compressed(llama.HERE / "awq.npz", ids=ids.to(torch.uint8).numpy(), **arrays, **weights)


if __name__ == "__main__":
    main()
