# SPDX-License-Identifier: Apache-2.0
"""Does every row of the kernel table earn its place here? One line a row and a kind of weights that it is chosen for.

    python bench/rows.py --threads 1 --shape 4096x4096

"without it": the row that would run these weights if this one were not there, and how many times as long it takes,
with 1, 8 and 128 tokens, in turn, processor time, medians. A row that is less than 1.2 times as fast wherever it is
chosen is named below the table: it should go.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fewbit import formats, kernels
from fewbit.containers.files import write_json
from fewbit.core.format import Format
from fewbit.kernels.table import KERNELS, Kernel, choose
from peers.fewbit_kernels import random
from timing import interleaved

FORMATS = (
    *("int1/channel", "int1/g128", "int2/g128", "int3/g128", "int4/g128", "int4/g64/asym", "int5/g128", "int6/g128"),
    *("int7/g128", "int8/g128", "nf4/g64", "palette2", "palette3", "palette4", "palette2/row", "palette3/row"),
    *("palette4/row", "palette8", "vector8x6+6", "vector4x8", "vector8x12"),
)
PAIRS = (*((name, x) for x in (None, "int8/channel") for name in FORMATS), ("sign/channel", "sign/channel"))
"""Weights, and what activations are rounded to."""
TOKENS = (1, 8, 128)
EARNED = 1.2
"""Times as fast as what would run without it, a row has to be somewhere."""


def chosen(shape: tuple[int, int]) -> Iterator[tuple[Kernel, Kernel, Format, Format | None]]:
    """Rows of an instruction set that weights and activations are given to here, and those that would come next."""
    for format, activation in ((formats.parse(name), formats.parse(x) if x else None) for name, x in PAIRS):
        row = choose(format, shape, activation=activation).kernel
        if row.isa not in (None, "serial"):
            yield row, _next(row, format, shape, activation), format, activation


def _next(row: Kernel, format: Format, shape: tuple[int, int], activation: Format | None) -> Kernel:
    """As ``choose`` goes through the table, without ``row``."""
    takes = (other for other in KERNELS if other is not row and other.refuse(format, shape, activation) is None)
    return next(other for other in takes if other.outdone(format) is None)


def times(
    both: tuple[Kernel, Kernel], format: Format, activation: Format | None, shape: tuple[int, int], seconds: float
) -> dict[int, tuple[float, float]]:
    """Median seconds of both rows, by tokens."""
    weight = random(format, shape)
    ready = [kernels.prepare(weight, row.name, activation=activation) for row in both]
    found = {}
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1])
        calls = [[lambda one=one, x=x: one(x)] for one in ready]
        first, second = interleaved(calls, seconds, 0.0, False, time.process_time)
        found[tokens] = (median(first), median(second))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", default="4096x4096", help="rows x columns")
    parser.add_argument("--seconds", type=float, default=1.0, help="for one number of tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    rows, columns = map(int, told.shape.split("x"))
    table, found, best = Table(*("row", "weights", "x", "without it", *map(str, TOKENS))), [], dict[str, float]()
    for row, other, format, activation in chosen((rows, columns)):
        took = times((row, other), format, activation, (rows, columns), told.seconds)
        ratios = {tokens: theirs / ours for tokens, (ours, theirs) in took.items()}
        best[row.name] = max(best.get(row.name, 0.0), *ratios.values())
        entry: dict[str, Any] = {"row": row.name, "without": other.name, "weights": format.name, "seconds": took}
        found.append({**entry, "x": activation.name if activation else "float32"})
        cells = [f"{ratio:.2f}" if ratio >= 1 else f"[bold]{ratio:.2f}[/]" for ratio in ratios.values()]
        table.add_row(row.name, format.name, found[-1]["x"], other.name, *cells)
    console = Console(width=120)
    console.print(table)
    for name in (name for name, ratio in best.items() if ratio < EARNED):
        console.print(f"{name} is nowhere {EARNED} times as fast as what would run without it")
    if told.json:
        write_json(told.json, {"arguments": {key: str(value) for key, value in vars(told).items()}, "rows": found})


if __name__ == "__main__":
    main()
