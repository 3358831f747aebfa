# SPDX-License-Identifier: Apache-2.0
"""VPTQ layer by layer: ours beside gptqmodel's, on the same weights and the same second moment.

    python bench/vptq_layers.py stories15m --calibration stories.txt --block 3 --layers q v down

Relative error of a layer's output, processor seconds of one thread, and our true bits. gptqmodel's is left out where
the package is not there; it is given inputs whose second moment is that of the calibration. (The package vptq has no
quantizer.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit import calibrate, formats, methods
from fewbit.core.facts import Accumulator, Facts
from fewbit.core.terms import repack
from fewbit.layouts.dense import DENSE

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}),
    "norm=rows": ({"norm": "rows"}, {"enable_norm": True, "norm_dim": 1}),
    "norm=columns": ({"norm": "columns"}, {"enable_norm": True, "norm_dim": 0}),
    "norm=both": ({"norm": "both"}, {}),
    "outliers=0.05": ({"outliers": 0.05}, {"npercent": 5, "enable_perm": True}),
    "outliers=0.05, two books of 32": ({"outliers": 0.05, "outlier_bits": 5, "outlier_residual_bits": 5}, {}),
    "norm=rows, outliers=0.05": (
        {"norm": "rows", "outliers": 0.05},
        {"enable_norm": True, "norm_dim": 1, "npercent": 5, "enable_perm": True},
    ),
}
"""Our options and gptqmodel's, by name; none of theirs where they have no such."""
Layers = dict[str, tuple[Tensor, Facts]]


@torch.no_grad()
def layers_of(told: argparse.Namespace) -> Layers:
    """Weights of the layers asked for, and facts of their inputs in float."""
    model = AutoModelForCausalLM.from_pretrained(told.model, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(told.model)
    seen: dict[str, Accumulator] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, given: seen[name].add(given[0])

    for name, layer in model.named_modules():
        short = name.rpartition(".")[2].removesuffix("_proj")
        if isinstance(layer, nn.Linear) and f".{told.block}." in name and short in told.layers:
            seen[name] = Accumulator(layer.in_features, gram=True)
            layer.register_forward_pre_hook(look(name))
    for ids in calibrate.calibration(words, told.calibration, told.samples, told.context, 0).ids:
        model(ids.unsqueeze(0))
    return {name: (model.get_submodule(name).weight.detach(), one.facts()) for name, one in seen.items()}


def ours(weight: Tensor, facts: Facts, format: str, options: dict[str, Any]) -> tuple[Tensor, float, float]:
    """Values, true bits and processor seconds."""
    began = time.process_time()
    made = methods.vptq(weight, formats.parse(format), facts, **options)
    took = time.process_time() - began
    packed = repack(made, lambda format: DENSE)
    return made.dequantize(), 8 * packed.nbytes / weight.numel(), took


def theirs(weight: Tensor, facts: Facts, format: str, options: dict[str, Any]) -> tuple[Tensor, float]:
    """Values and processor seconds of gptqmodel's, with as many books of as many vectors."""
    from gptqmodel.quantization.config import VPTQConfig
    from gptqmodel.quantization.vptq import VPTQ

    spelt: Any = formats.parse(format)
    few = "npercent" in options
    config = VPTQConfig(
        vector_lens=[2 if few else -1, spelt.length],
        num_centroids=[64 if few else -1, 1 << spelt.index_bits],
        num_res_centroids=[-1, 1 << spelt.residual_bits if spelt.residual_bits else -1],
        fallback=None,
        **options,
    )
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.clone()
    solver, moment = VPTQ(linear, config), facts.second_moment.double()
    root = torch.linalg.cholesky(moment + 1e-7 * moment.diagonal().mean() * torch.eye(len(moment)))
    solver.add_batch(root.T.float() * len(moment) ** 0.5)
    began = time.process_time()
    made, *_ = solver.quantize()
    return made.quantized_weight.float(), time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--layers", nargs="+", default=["q", "v", "up", "down"])
    parser.add_argument("--formats", nargs="+", default=["vector4x8", "vector4x5+4", "vector2x4"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--peer", action="store_true", help="gptqmodel's too")
    told = parser.parse_args()
    torch.set_num_threads(1)
    layers = layers_of(told)
    table = Table("format", "options", *layers)
    for format in told.formats:
        for setting in told.settings:
            mine, other = SETTINGS[setting]
            cells: list[list[str]] = [[], []]
            for weight, facts in layers.values():
                values, bits, took = ours(weight, facts, format, mine)
                cells[0].append(f"{methods.relative_error(weight, values, facts):.4f} ({bits:.3f}, {took:.1f} s)")
                if told.peer and (other or not setting):
                    values, took = theirs(weight, facts, format, other)
                    cells[1].append(f"{methods.relative_error(weight, values, facts):.4f} ({took:.1f} s)")
            for package, row in zip(("fewbit", "gptqmodel"), cells, strict=True):
                if row:
                    print(format, setting, package, *row, sep=" | ", flush=True)
                    table.add_row(format, f"{package} {setting}", *row)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
