# SPDX-License-Identifier: Apache-2.0
"""How long do the products of attention in windows take in integers, beside torch's in float? One table.

    python bench/products.py

Windows of 8 x 8 positions; channels a head and heads as in MobileSR (5, 8 heads) and SwinIR-light (10, 6 heads).
Processor time of one call for all windows and heads, the median of interleaved rounds; operands are rounded to 8 bits
in the call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fewbit import kernels
from fewbit.formats.fixed import Fixed

POSITIONS = 64
SHAPES = ((5, 8), (10, 6), (30, 6))
"""Channels of a head, and heads."""


def ways(channels: int, heads: int, windows: int) -> dict[str, Callable[[], Tensor]]:
    qkv = torch.randn(windows, POSITIONS, 3 * heads * channels)
    q, k, v = (part.unflatten(2, (heads, channels)).transpose(1, 2) for part in qkv.chunk(3, 2))
    keys = k.transpose(2, 3)
    weights = (q @ keys).softmax(3)
    grid, floor = Fixed(8, False).at(-3.0, 3.0), Fixed(8, False).at(0.0, 1.0)

    def whole() -> Tensor:
        return kernels.matmul(kernels.matmul(q, keys, grid, grid).softmax(3), v, floor, grid)

    return {
        "scores, float": lambda: q @ keys,
        "scores, integers": lambda: kernels.matmul(q, keys, grid, grid),
        "map with values, float": lambda: weights @ v,
        "map with values, integers": lambda: kernels.matmul(weights, v, floor, grid),
        "both and softmax, float": lambda: (q @ keys).softmax(3) @ v,
        "both and softmax, integers": whole,
        "both and softmax, torch's fused attention": lambda: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    }


def microseconds(calls: dict[str, Callable[[], Tensor]], rounds: int, repeats: int = 5) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            for _ in range(repeats):
                call()
            taken[name].append((time.process_time() - began) / repeats * 1e6)
    return {name: median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("us a call", *(f"{heads} heads of {channels}" for channels, heads in SHAPES))
    columns = [microseconds(ways(*shape, arguments.windows), arguments.rounds) for shape in SHAPES]
    for name in columns[0]:
        table.add_row(name, *(f"{column[name]:.0f}" for column in columns))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
