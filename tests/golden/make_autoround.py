# SPDX-License-Identifier: Apache-2.0
"""Writes autoround.npz with auto-round 0.16.1, transformers 5.23.0 and torch 2.13.0 on the CPU, in an environment of
its own: ``python tests/golden/make_autoround.py``.

One block of a random Llama (64 wide, heavy-tailed weights of float16): ``weight.{parameter}`` float16;
``ids`` (12, 64) uint8, windows of prose without spaces, ``!`` being token 2; and what 60 iterations of 8 windows at 3
bits in groups of 32 with zero points make of each of its layers, in float32: ``{layer}.codes`` uint8, ``{layer}.scale``
and ``{layer}.zero`` float16 (rows, groups).
"""

import llama
import numpy as np
import torch
from auto_round import AutoRound
from torch import Tensor

GROUP = 32


def drawn(values: Tensor) -> Tensor:
    """Of a matrix so that outputs are of the size of inputs, some weights being much larger than the rest."""
    if values.ndim != 2:
        return values
    return torch.distributions.StudentT(4.0).sample(values.shape) / (2 * values.shape[1]) ** 0.5


def main() -> None:
    torch.set_num_threads(1)
    network, ids = llama.block(20, heads=2, wide=64, weight=drawn), llama.windows()
    weights = {f"weight.{n}": p.detach().half().numpy() for n, p in network.named_parameters() if p.ndim == 2}
    rows = [{"input_ids": row[None], "attention_mask": torch.ones(1, llama.CONTEXT, dtype=torch.int64)} for row in ids]
    solver = AutoRound(
        network, tokenizer=object(), bits=3, group_size=GROUP, sym=False, dataset=rows, iters=60, seqlen=llama.CONTEXT,
        nsamples=llama.WINDOWS, batch_size=8, amp=False, enable_torch_compile=False, device_map="cpu",
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
    np.savez_compressed(llama.HERE / "autoround.npz", **arrays)


if __name__ == "__main__":
    main()
