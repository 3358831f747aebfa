# SPDX-License-Identifier: Apache-2.0
"""How fast are the linear kernels beside torch's float ``linear``, and how exact?

``python bench/kernels.py [--batch 1 --batch 8] [--threads N] [--kernel avx2] [--json FILE]``

Every row of a table is measured in the same loop, one call of each in turn, so that a noisy moment hits all alike.
Weights are rotated through more than three times the last-level cache: at batch 1 each call streams its weight from
memory. "of stream" is the share of a plain read stream measured in that same loop. The error is the norm of the
difference to float64 (of the very weight that the row holds, on the activations as they came) over the norm of the
answer, on a sample of rows. Rows "x int8/..." round activations to that format and multiply integers.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewbit import formats, kernels
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native

FORMATS = (*(f"int{bits}/g128" for bits in range(1, 9)), "int4/g64/asym", "nf4/g64")
FLOAT = "float"
ACTIVATIONS = (FLOAT, "int8/channel")
INTEGERS = {"avx512": "avx512vnni"}
"""The instruction set that multiplies integers where another name was asked for."""
SHAPES = ("11008x4096", "4096x11008", "4096x4096")
ROTATE = 3 * 32 * 2**20 + 2**20
"""Bytes of distinct weights a row goes through."""
SAMPLE = 64
"""Rows of the output whose error is computed."""

Call = Callable[[], object]
Row = dict[str, Any]


def copies(nbytes: int) -> int:
    return -(-ROTATE // nbytes)


def relative(y: Tensor, answer: Tensor) -> float:
    return float((y.double() - answer).norm() / answer.norm())


def float_row(shape: tuple[int, int], x: Tensor, dtype: torch.dtype) -> tuple[Row, list[Call]]:
    """torch's linear in ``dtype``; x and weight are rounded to it, y is what it returns."""
    size = shape[0] * shape[1] * dtype.itemsize
    weights = [torch.randn(shape).to(dtype) for _ in range(copies(size))]
    x = x.to(dtype)
    answer = x.double() @ weights[0][:SAMPLE].double().T
    error = relative(torch.nn.functional.linear(x, weights[0])[:, :SAMPLE], answer)
    name = f"torch {str(dtype).removeprefix('torch.')}"
    row = {"name": name, "kernel": "torch", "bits": 8.0 * dtype.itemsize, "bytes": size, "relative_error": error}
    return row, [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def fewbit_row(
    shape: tuple[int, int], x: Tensor, spelling: str, activation: str, isa: str | None
) -> tuple[Row, list[Call]] | None:
    """One of our kernels on random codes; scales as a quantized normal weight has them. None: no kernel of integers."""
    format = formats.parse(spelling)
    blocks = (shape[0], -(-shape[1] // format.block), 1)
    params = {"scale": (torch.rand(blocks) + 0.5).half() / format.levels}
    if len(format.params) > 1:
        params["zero_point"] = torch.randint(0, format.levels, blocks, dtype=torch.uint8)
    codes = torch.randint(0, format.levels, shape, dtype=torch.uint8)
    matrix = QTensor.of(format, codes, params)
    family = format.physical({name: values[:1] for name, values in params.items()}).family
    inputs = None if activation == FLOAT else formats.parse(activation)
    if inputs is not None:
        chosen = kernels.choose(format, shape, activation=inputs).kernel
        if not chosen.integers:
            return None
        family, isa = str(chosen.family), INTEGERS.get(str(isa), isa)
    first = kernels.prepare(matrix, f"{family}_linear_{isa}" if isa else None, inputs)
    few = QTensor.of(format, codes[:SAMPLE], {name: values[:SAMPLE] for name, values in params.items()})
    error = relative(first(x)[:, :SAMPLE], kernels.reference.oracle(x, few))
    bits = 8 * first.read_bytes / (shape[0] * shape[1])
    name = spelling if inputs is None else f"{spelling} x {activation}"
    row = {"name": name, "kernel": first.kernel, "bits": bits, "bytes": first.read_bytes, "relative_error": error}
    prepared = [first, *(copy.deepcopy(first) for _ in range(copies(first.read_bytes) - 1))]
    return row, [lambda p=p: p(x) for p in prepared]  # type: ignore[misc]


def stream_row(threads: int) -> tuple[Row, list[Call]]:
    memory = torch.zeros(ROTATE // 4 // 4 * 4, dtype=torch.uint8)
    parts = [torch.zeros_like(memory) for _ in range(4)]
    calls: list[Call] = [lambda p=p: native.core().read_stream(p.data_ptr(), p.numel(), threads) for p in parts]  # type: ignore[misc]
    return {"name": "read stream", "kernel": "-", "bits": None, "bytes": memory.numel(), "relative_error": None}, calls


def interleaved(rows: list[list[Call]], seconds: float) -> list[list[float]]:
    """Seconds of every call: rounds of one call a row, each row rotating through its own, until time is up."""
    found: list[list[float]] = [[] for _ in rows]
    for calls in rows:
        calls[0]()
    stop, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or turn < 3:
        for calls, times in zip(rows, found, strict=True):
            call = calls[turn % len(calls)]
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        turn += 1
    return found


def measure(shape: tuple[int, int], batch: int, arguments: argparse.Namespace) -> list[Row]:
    x = torch.randn(batch, shape[1])
    made = [float_row(shape, x, torch.float32), float_row(shape, x, torch.bfloat16), stream_row(arguments.threads)]
    for activation in arguments.activation or ACTIVATIONS:
        for spelling in arguments.format or FORMATS:
            row = fewbit_row(shape, x, spelling, activation, arguments.kernel)
            made += [] if row is None else [row]
    times = interleaved([calls for _, calls in made], arguments.seconds)
    rows = [row for row, _ in made]
    for row, found in zip(rows, times, strict=True):
        row |= {"shape": list(shape), "batch": batch, "calls": len(found)}
        row |= {"seconds": statistics.median(found), "seconds_least": min(found)}
        row["gbytes_per_s"] = row["bytes"] / row["seconds"] / 1e9
        row["gflops"] = None if row["bits"] is None else 2e-9 * batch * shape[0] * shape[1] / row["seconds"]
    for row in rows:
        row["of_stream"] = row["gbytes_per_s"] / rows[2]["gbytes_per_s"]
        row["times_float32"] = rows[0]["seconds"] / row["seconds"]
        row["times_bfloat16"] = rows[1]["seconds"] / row["seconds"]
    return rows


def show(rows: list[Row], title: str, console: Console) -> None:
    table = Table(title=title)
    columns = ("", "kernel", "bits/w", "us", "least us", "GB/s", "of stream", "GFLOPS", "x fp32", "x bf16", "error")
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "kernel") else "right")
    for row in rows:
        layer = row["bits"] is not None
        table.add_row(
            row["name"],
            row["kernel"],
            f"{row['bits']:.2f}" if layer else "",
            f"{row['seconds'] * 1e6:.0f}",
            f"{row['seconds_least'] * 1e6:.0f}",
            f"{row['gbytes_per_s']:.1f}",
            f"{row['of_stream']:.0%}",
            f"{row['gflops']:.0f}" if layer else "",
            f"{row['times_float32']:.2f}" if layer else "",
            f"{row['times_bfloat16']:.2f}" if layer else "",
            f"{row['relative_error']:.1e}" if layer else "",
        )
    console.print(table)


def parse(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"rows x columns; default {', '.join(SHAPES)}")
    parser.add_argument("--batch", action="append", type=int, help="tokens; default 1")
    parser.add_argument("--format", action="append", help=f"default {', '.join(FORMATS)}")
    parser.add_argument("--activation", action="append", help=f"default {', '.join(ACTIVATIONS)}; or int8/g64, ...")
    parser.add_argument("--kernel", help="force an instruction set: avx512, avx2, neon, serial")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15, help="measuring time a table")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words if words is None else list(words))


def main() -> int:
    arguments = parse()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if not native.available():
        console.print(f"nothing to measure: {native.why_not()}")
        return 4
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    kernels.set_threads(arguments.threads)
    rows = []
    for text in arguments.shape or SHAPES:
        for batch in arguments.batch or [1]:
            height, width = (int(part) for part in text.split("x"))
            found = measure((height, width), batch, arguments)
            show(found, f"{text}, batch {batch}, {arguments.threads} threads", console)
            rows += found
    if arguments.json:
        about = {"command": sys.argv, "threads": arguments.threads, "torch": torch.__version__, "isas": native.isas()}
        about |= {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    slower = [row for row in rows if row["batch"] == 1 and row["kernel"] not in ("torch", "-") and row["bits"] < 8]
    slower = [row for row in slower if min(row["times_float32"], row["times_bfloat16"]) <= 1]
    for row in slower:
        console.print(f"slower than torch: {row['name']} {row['shape']}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
