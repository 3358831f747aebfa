# SPDX-License-Identifier: Apache-2.0
"""Writes layer.npz, what the solvers of the other scripts here are given: ``python tests/golden/make_layer.py MODEL``,
MODEL being stories15m as a folder, with transformers 5.23.0 and torch 2.13.0 on the CPU.

A corner of ``layers.3.mlp.down_proj``: ``inputs`` (192, 128) float16, its first inputs in the first windows of the
model's own stories, and ``sym4`` and ``asym3`` (32, 128) float16, its weights for groups of 32. There the ends of every
group are moved, by less than one part in 64 of its range, to where the scale of that grid (4 bits symmetric, 3 bits
asymmetric) is a float16 of 7 significant bits: so solvers that keep scales in float32 and in float16 have the same.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS, COLUMNS, TOKENS, GROUP = 32, 128, 192, 32


def short(scale: torch.Tensor) -> torch.Tensor:
    """``scale`` rounded up to 7 significant bits."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 128).ceil() / 128, exponent)


def symmetric(weight: torch.Tensor) -> torch.Tensor:
    """With the largest magnitude of each group at 7.5 scales."""
    groups = weight.reshape(ROWS, -1, GROUP).clone()
    place = groups.abs().argmax(-1, keepdim=True)
    end = 7.5 * short(groups.abs().amax(-1, keepdim=True) / 7.5) * groups.gather(-1, place).sign()
    return groups.scatter(-1, place, end).reshape(ROWS, COLUMNS)


def asymmetric(weight: torch.Tensor) -> torch.Tensor:
    """With the ends of each group at whole multiples of a seventh of its range."""
    groups = weight.reshape(ROWS, -1, GROUP).clone()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    zero = (-7 * low / (high - low)).round()
    scale = short(torch.maximum(-low / zero, high / (7 - zero)))
    return (
        groups.clamp(-zero * scale, (7 - zero) * scale)
        .scatter(-1, groups.argmin(-1, keepdim=True), -zero * scale)
        .scatter(-1, groups.argmax(-1, keepdim=True), (7 - zero) * scale)
        .reshape(ROWS, COLUMNS)
    )


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    layer, seen = model.model.layers[3].mlp.down_proj, []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    model(input_ids=words((folder / "samples.txt").read_text()[:4000], return_tensors="pt").input_ids[:, :TOKENS])
    weight = layer.weight[:ROWS, :COLUMNS]
    arrays = {"inputs": seen[0][:, :COLUMNS], "sym4": symmetric(weight), "asym3": asymmetric(weight)}
    for array in arrays.values():
        assert array.isfinite().all()
    for name in ("sym4", "asym3"):
        assert torch.equal(arrays[name].half().float().amax(), arrays[name].amax()), "ends are no float16"
    np.savez_compressed(Path(__file__).parent / "layer.npz", **{n: a.half().numpy() for n, a in arrays.items()})


if __name__ == "__main__":
    main()
