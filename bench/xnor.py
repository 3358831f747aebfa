# SPDX-License-Identifier: Apache-2.0
"""How fast are signs counted beside the machine's limit, the same signs times int8 or float activations, and torch?

``python bench/xnor.py [--tokens 1 --tokens 512] [--shape 4096x4096] [--threads N] [--json FILE]``

Every row is measured in the same loop, one call of each in turn. A product of two signs counts as two operations. "of
peak" is the share of exclusive or + popcount + add on registers (``xnor_peak.cc``, compiled here for this processor),
"apart" of the same with nibbles taken apart beforehand, which is what our AVX2 kernel does. On one thread times are
those of the thread's own clock, so that neighbours cost only what they share with it. Weights of fewbit rows are
rotated through more than three times the last-level cache, and "GB/s" is what they read of them at least, beside a
plain read stream. The error is the norm of the difference to float64 over the norm of the answer, on the inputs as the
row rounds them, on a sample of rows.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import limits
from fewbit import formats, kernels
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native
from peers.row import ROTATE, SAMPLE, Call
from session import begun

SOURCE = Path(__file__).with_name("xnor_peak.cc")
ROUNDS = 100_000
"""Of the peak's loop: a millisecond or less."""
SIGN = formats.parse("sign/channel")
INPUTS = {"": None, " x int8": formats.parse("int8/channel"), " x signs": SIGN}

Row = dict[str, Any]


def peaks(threads: int) -> list[tuple[Row, list[Call]]]:
    """The limit, computed on every thread at once."""
    peak = limits.compiled(SOURCE).xnor_peak
    peak.restype, peak.argtypes = ctypes.c_int64, [ctypes.c_int64, ctypes.c_int]
    pool = ThreadPoolExecutor(threads)

    def run(apart: int) -> object:
        if threads == 1:
            return peak(ROUNDS, apart)
        return list(pool.map(peak, [ROUNDS] * threads, [apart] * threads))

    memory = limits.read_stream(threads)
    stream: Row = {"name": memory.name, "kernel": "-", "bytes": memory.nbytes, "operations": 0, "relative_error": None}
    signs = peak(1, 0) * ROUNDS * threads
    return [
        ({"name": name, "kernel": "-", "operations": 2 * signs, "relative_error": None}, [lambda a=apart: run(a)])  # type: ignore[misc]
        for apart, name in enumerate(("xor + popcount + add", "the same, apart"))
    ] + [(stream, memory.calls)]


def fewbit_row(matrix: QTensor, x: torch.Tensor, name: str, inputs: Format | None) -> tuple[Row, list[Call]]:
    kernel = name if "_linear_" in name else None
    first = kernels.prepare(matrix, kernel, inputs)
    codes, params = matrix.logical()
    few = QTensor.of(matrix.format, codes[:SAMPLE], {key: values[:SAMPLE] for key, values in params.items()})
    answer = kernels.reference.oracle(kernels.reference.round_activations(x, inputs), few)
    error = float((first(x)[:, :SAMPLE].double() - answer).norm() / answer.norm())
    prepared = [first, *(copy.deepcopy(first) for _ in range(ROTATE // first.read_bytes))]
    row = {"name": "signs x signs" if kernel else f"signs{name}", "kernel": first.kernel, "bytes": first.read_bytes}
    return row | {"relative_error": error}, [lambda p=p: p(x) for p in prepared]  # type: ignore[misc]


def torch_row(shape: tuple[int, int], x: torch.Tensor) -> tuple[Row, list[Call]]:
    weight = torch.randn(shape)
    row = {"name": "torch float32", "kernel": "torch", "relative_error": None}
    return row, [lambda: torch.nn.functional.linear(x, weight)]


def measure(shape: tuple[int, int], tokens: int, bounds: list[tuple[Row, list[Call]]], options: Any) -> list[Row]:
    x = torch.randn(tokens, shape[1])
    codes = torch.randint(0, 2, shape, dtype=torch.uint8)
    matrix = QTensor.of(SIGN, codes, {"scale": (torch.rand(shape[0], 1, 1) + 0.5).half()})
    made = [({**row}, calls) for row, calls in bounds]
    made += [fewbit_row(matrix, x, name, inputs) for name, inputs in INPUTS.items()]
    made += [fewbit_row(matrix, x, "xnor_linear_serial", SIGN), torch_row(shape, x)]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    found: list[list[float]] = [[] for _ in made]
    for turn in range(options.rounds + 1):
        for (_, calls), times in zip(made, found, strict=True):
            start = clock()
            calls[turn % len(calls)]()
            times.append(clock() - start)
    rows = [row for row, _ in made]
    for row, times in zip(rows, found, strict=True):
        row |= {
            "shape": list(shape),
            "tokens": tokens,
            "seconds": statistics.median(times[1:]),
            "least": min(times[1:]),
        }
        row["gbytes_per_s"] = row["bytes"] / row["seconds"] / 1e9 if "bytes" in row else None
        row["gops"] = row.setdefault("operations", 2 * tokens * shape[0] * shape[1]) / row["seconds"] / 1e9
    for row in rows:
        row["of_peak"], row["of_apart"] = row["gops"] / rows[0]["gops"], row["gops"] / rows[1]["gops"]
    return rows


def show(rows: list[Row], title: str, console: Console) -> None:
    table = Table(title=title)
    for name in ("", "kernel", "us", "least us", "GB/s", "Gop/s", "of peak", "of apart", "error"):
        table.add_column(name, justify="left" if name in ("", "kernel") else "right")
    for row in rows:
        read = "" if row["gbytes_per_s"] is None else f"{row['gbytes_per_s']:.1f}"
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        speed = f"{row['seconds'] * 1e6:.0f}", f"{row['least'] * 1e6:.0f}", read, f"{row['gops']:.0f}"
        table.add_row(row["name"], row["kernel"], *speed, f"{row['of_peak']:.0%}", f"{row['of_apart']:.0%}", error)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows x columns; default 4096x4096")
    parser.add_argument("--tokens", action="append", type=int, help="default 1, 8 and 512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = begun(options.threads, 120)
    rows = []
    bounds = peaks(options.threads)
    for text in options.shape or ["4096x4096"]:
        for tokens in options.tokens or [1, 8, 512]:
            height, width = (int(part) for part in text.split("x"))
            found = measure((height, width), tokens, bounds, options)
            show(found, f"{text}, {tokens} tokens, {options.threads} threads", console)
            rows += found
    if options.json:
        about = {"command": sys.argv, "torch": torch.__version__, "isas": native.isas(), "machine": platform.machine()}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
