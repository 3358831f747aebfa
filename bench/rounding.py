# SPDX-License-Identifier: Apache-2.0
"""What does rounding to integers cost: a weight, and a layer? Two tables.

    python bench/rounding.py

A weight: of one matrix, in nanoseconds. ``round``: grids fitted, codes, scales as files hold them, what is lost, and
whether all is finite; the same by torch's operations; ``pack`` and ``unpack``: codes to fields and back. A layer: a
network of 420 layers of 32 x 32, so small that weights hardly count, here and by torchao (where it is installed: ``pip
install torchao``), in microseconds. Processor time on one thread, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fewbit import formats, network
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor, sum_of_squares
from fewbit.run.solve import layout_for

LAYERS, WIDTH = 420, 32
FORMATS = tuple(f"int{bits}/g32/asym" for bits in range(1, 9))


def by_torch(format: F.Format, weight: torch.Tensor) -> tuple[float, float]:
    """The same result: codes and parameters, then the squares of what is lost and of the weight."""
    params = F.fit(format, weight)
    codes = F.encode(format, weight, params)
    return sum_of_squares(F.decode(format, codes, params) - weight), sum_of_squares(weight)


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a call, by name."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            call()
            taken[name].append(time.process_time() - began)
    return {name: median(each) for name, each in taken.items()}


def weights(spelt: str, shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Nanoseconds a weight."""
    weight = torch.randn(shape) * 0.05
    format = formats.parse(spelt).bind(weight)
    made = QTensor.rounded(format, weight)
    packed = made.repack(layout_for(format))
    calls = {
        "round": lambda: QTensor.rounded(format, weight),
        "round, torch": lambda: by_torch(format, weight),
        "pack": lambda: made.repack(layout_for(format)),
        "unpack": packed.logical,
    }
    return {name: seconds / weight.numel() * 1e9 for name, seconds in timed(calls, rounds).items()}


def layers(rounds: int) -> dict[str, float]:
    """Microseconds a layer."""
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    taken: dict[str, list[float]] = {}

    def one(name: str, quantize: Callable[[nn.Module], Any]) -> None:
        fresh = copy.deepcopy(base)
        began = time.process_time()
        quantize(fresh)
        taken.setdefault(name, []).append(time.process_time() - began)

    for _ in range(rounds):
        one("fewbit", lambda module: network.quantize(module, "int4/g32/asym", inplace=True))
        if importlib.util.find_spec("torchao"):
            one("torchao", by_torchao)
    return {name: median(each) / LAYERS * 1e6 for name, each in taken.items()}


def by_torchao(module: nn.Module) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    quantize_(module, IntxWeightOnlyConfig(torch.int4, PerGroup(32), MappingType.ASYMMETRIC))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="768x288", help="rows x columns of the matrix")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    rows, columns = map(int, arguments.shape.split("x"))
    found = {spelt: weights(spelt, (rows, columns), arguments.rounds) for spelt in FORMATS}
    table = Table("ns a weight", *found[FORMATS[0]], title=f"{rows} x {columns}")
    for spelt, each in found.items():
        table.add_row(spelt, *(f"{value:.2f}" for value in each.values()))
    console = Console()
    console.print(table)
    table = Table("", "us a layer", title=f"{LAYERS} layers of {WIDTH} x {WIDTH}, int4/g32/asym")
    for name, value in layers(max(3, arguments.rounds // 20)).items():
        table.add_row(name, f"{value:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
