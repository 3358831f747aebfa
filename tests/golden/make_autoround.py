# SPDX-License-Identifier: Apache-2.0
"""Writes autoround.npz with auto-round 0.16.1, transformers 5.23.0 and torch 2.13.0 on the CPU, in an environment of
its own: ``python tests/golden/make_autoround.py``.

One block of a random Llama (64 wide, heavy-tailed weights of float16): ``weight.{parameter}`` float16;
``ids`` (12, 64) uint8, windows of prose without spaces, ``!`` being token 2; and what 60 iterations of 8 windows at 3
bits in groups of 32 with zero points make of each of its layers, in float32: ``{layer}.codes`` uint8, ``{layer}.scale``
and ``{layer}.zero`` float16 (rows, groups).
"""

import lzma
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
WINDOWS, CONTEXT, GROUP = 12, 64, 32
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def model() -> LlamaForCausalLM:
    """A block whose outputs are of the size of its inputs, some weights being much larger than the rest."""
    torch.manual_seed(20)
    network = LlamaForCausalLM(LlamaConfig(**SHAPE)).float().eval()
    for name, parameter in network.named_parameters():
        if "embed" in name:
            parameter.data = (torch.randn(parameter.shape) * 32).round() / 32
        elif parameter.ndim == 2:
            tail = torch.distributions.StudentT(4.0).sample(parameter.shape)
            parameter.data = (tail / (2 * parameter.shape[1]) ** 0.5).half().float()
    return network


def main() -> None:
    torch.set_num_threads(1)
    network = model()
    weights = {f"weight.{n}": p.detach().half().numpy() for n, p in network.named_parameters() if p.ndim == 2}
    prose = HERE.parent.parent / "src" / "fewbit" / "data" / "heldout.txt.xz"
    with lzma.open(prose, "rt", encoding="ascii", errors="ignore") as file:
        text = "_".join(file.read(4000).split())[: WINDOWS * CONTEXT]
    ids = torch.tensor([ord(letter) - ord("!") + 2 for letter in text]).reshape(WINDOWS, CONTEXT)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones(1, CONTEXT, dtype=torch.int64)} for row in ids]
    solver = AutoRound(
        network, tokenizer=object(), bits=3, group_size=GROUP, sym=False, dataset=rows, iters=60, seqlen=CONTEXT,
        nsamples=WINDOWS, batch_size=8, amp=False, enable_torch_compile=False, device_map="cpu",
    )  # fmt: skip
    made, _ = solver.quantize()
    arrays = {"ids": ids.to(torch.uint8).numpy(), **weights}
    for name, layer in made.model.layers[0].named_modules():
        if isinstance(layer, torch.nn.Linear):
            scale, zero = (part.float().reshape(len(layer.weight), -1, 1) for part in (layer.scale, layer.zp))
            codes = layer.weight.detach().float().reshape(len(scale), -1, GROUP) / scale + zero
            assert float((codes - codes.round()).abs().max()) < 0.01
            arrays[f"{name}.codes"] = codes.round().reshape(layer.weight.shape).to(torch.uint8).numpy()
            arrays |= {f"{name}.scale": scale.half().numpy(), f"{name}.zero": zero.half().numpy()}
    np.savez_compressed(HERE / "autoround.npz", **arrays)


if __name__ == "__main__":
    main()
