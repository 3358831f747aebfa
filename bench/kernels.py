# SPDX-License-Identifier: Apache-2.0
"""How fast are the linear kernels beside those of others and beside what the machine can do, and how exact?

    pip install -e '.[bench]'
    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
    python bench/kernels.py --threads 1 --shape 4096x4096 --batch 1 --batch 128 --json kernels.json --plot kernels.png

Every row of a table is measured in the same loop, one call of each in turn, so that a noisy moment hits all alike, and
right after a call that is not timed, on other weights, so that its code is warm and its weights are not: our kernels,
torch's float ``linear``, llama.cpp, onnxruntime and torchao (what is not installed is said, with how to get it), a
plain read stream and the arithmetic peaks. Weights are rotated through more than three times the last-level cache: at
batch 1 each call streams its weight from memory. With several threads there is a pause between calls, for the idle
workers of others to fall asleep. On a machine that others use, "--clock processor" keeps their share of long calls out;
a busy memory still slows every row.

"x" is what activations are rounded to inside: "int8/g32" one scale a token and 32 columns, "int8/channel" one a token;
these rows multiply integers and are held against the int8 peak, others against that of float32. The error is the norm
of the difference to float64 (of the very weight that the row holds, on the activations as they came) over the norm of
the answer, on a sample of rows. Our rows are held against the fastest peer whose codes have as many bits ("x peer":
its time over ours), the fastest that stores no more bits in all ("x fewer") and the fastest that stores no fewer
("x more").
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import limits
import plot
from fewbit.kernels import native
from peers import fewbit_kernels, llama_cpp, onnx_runtime, torch_ao, torch_linear
from peers.row import Prepared, Problem, Row, Unavailable, grouped
from session import begun
from timing import interleaved

FORMATS = [*(f"int{bits}/g128" for bits in range(1, 9)), "ternary/g128", "int4/g64/asym", "nf4/g64", "vector8x12"]
ACTIVATIONS = [fewbit_kernels.FLOAT, "int8/channel"]
SHAPES = ["11008x4096", "4096x11008", "4096x4096"]
PEERS = ("llama.cpp", "onnxruntime", "torchao")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PAUSE = 0.003
"""Seconds between calls of several threads: longer than anybody's idle workers spin."""

Found = dict[str, Any]


def prepared(rows: Iterable[Row], problem: Problem) -> tuple[list[tuple[Row, Prepared]], list[str]]:
    """The rows that can be measured here, and a line for each reason why others cannot."""
    made, missing = [], []
    for row in rows:
        try:
            made.append((row, row.prepare(problem)))
        except Unavailable as reason:
            missing.append((row, str(reason)))
    return made, grouped(missing)


def timed(times: list[float]) -> Found:
    return {"calls": len(times), "seconds": statistics.median(times), "seconds_least": min(times)}


def described(row: Row, ready: Prepared, problem: Problem, times: list[float]) -> Found:
    weights = problem.weight.numel()
    found = {"engine": row.engine, "name": row.name, "kernel": ready.kernel, "activations": row.activations}
    found |= {"codes": row.codes, "bits": 8 * ready.nbytes / weights, "bytes": ready.nbytes, "integer": row.integer}
    found |= {"shape": list(problem.shape), "batch": len(problem.x), "relative_error": ready.error(problem.x)}
    found |= timed(times)
    found["gbytes_per_s"] = ready.nbytes / found["seconds"] / 1e9
    found["gops"] = 2e-9 * weights * len(problem.x) / found["seconds"]
    return found


def compare(rows: list[Found], limits: dict[str, Found]) -> None:
    """Adds to every row its share of the limits, and to ours how many times faster than others they are."""
    floats = {row["name"]: row["seconds"] for row in rows if row["engine"] == "torch" and row["bits"] >= 16}
    peers = [row for row in rows if row["engine"] != "fewbit"]
    for row in rows:
        peak = limits.get("int8 peak" if row["integer"] else "float32 peak")
        row["of_stream"] = row["gbytes_per_s"] / limits["read stream"]["gbytes_per_s"]
        row["of_peak"] = row["gops"] / peak["gops"] if peak else None
        row |= {f"times_{name}": seconds / row["seconds"] for name, seconds in floats.items()}
        if row["engine"] != "fewbit":
            continue
        rivals = {
            "peer": [peer for peer in peers if peer["codes"] == row["codes"]],
            "fewer": [peer for peer in peers if peer["bits"] <= row["bits"]],
            "more": [peer for peer in peers if peer["bits"] >= row["bits"]],
        }
        for key, some in rivals.items():
            best = min(some, key=lambda peer: peer["seconds"], default=None)
            row[f"times_{key}"] = best["seconds"] / row["seconds"] if best else None
            row[f"best_{key}"] = f"{best['engine']} {best['name']}" if best else None


def measure(shape: tuple[int, int], batch: int, rows: list[Row], arguments: argparse.Namespace) -> Found:
    """One table: {"rows", "limits", "missing"}."""
    threads = arguments.threads
    problem = Problem(torch.randn(shape), torch.randn(batch, shape[1]), threads, arguments.cached)
    made, missing = prepared(rows, problem)
    bounds = [limits.read_stream(threads)]
    try:
        bounds += limits.peaks(threads)
    except Unavailable as reason:
        missing.append(f"not measured: the arithmetic peaks: {reason}")
    calls = [limit.calls for limit in bounds] + [ready.calls for _, ready in made]
    times = interleaved(calls, arguments.seconds, PAUSE if threads > 1 else 0, True, CLOCKS[arguments.clock])
    known = {}
    for limit, found in zip(bounds, times[: len(bounds)], strict=True):
        known[limit.name] = {"how": limit.how} | timed(found)
        known[limit.name]["gbytes_per_s"] = limit.nbytes / known[limit.name]["seconds"] / 1e9
        known[limit.name]["gops"] = limit.operations / known[limit.name]["seconds"] / 1e9
    done = [described(*each, problem, found) for each, found in zip(made, times[len(bounds) :], strict=True)]  # type: ignore[misc]
    compare(done, known)
    return {"shape": list(shape), "batch": batch, "limits": known, "missing": missing, "rows": done}


def processor() -> str:
    """The processor's own name, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    found = {}
    for package in ("llama-cpp-python", "onnxruntime", "torchao"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


Cell = Callable[[Found], str]


def number(key: str, format: str, times: float = 1) -> Cell:
    return lambda row: "" if row.get(key) is None else format.format(row[key] * times)


COLUMNS: dict[str, Cell] = {
    "row": lambda row: f"{row['engine']} {row['name']}",
    "kernel": lambda row: str(row["kernel"]),
    "x": lambda row: str(row["activations"]),
    "bits": number("bits", "{:.2f}"),
    "us": number("seconds", "{:.0f}", 1e6),
    "GB/s": number("gbytes_per_s", "{:.1f}"),
    "of stream": number("of_stream", "{:.0%}"),
    "GOPS": number("gops", "{:.0f}"),
    "of peak": number("of_peak", "{:.0%}"),
    "error": number("relative_error", "{:.1e}"),
    "x peer": number("times_peer", "{:.2f}"),
    "x fewer": number("times_fewer", "{:.2f}"),
    "x more": number("times_more", "{:.2f}"),
}


def show(table: Found, threads: int, console: Console) -> None:
    shape = "x".join(map(str, table["shape"]))
    printed = Table(title=f"{shape}, batch {table['batch']}, {threads} thread{'s' * (threads > 1)}")
    for name in COLUMNS:
        printed.add_column(name, justify="left" if name in ("row", "kernel", "x") else "right", no_wrap=True)
    for row in sorted(table["rows"], key=lambda row: row["seconds"]):
        printed.add_row(*(cell(row) for cell in COLUMNS.values()), style="bold" if row["engine"] == "fewbit" else "")
    console.print(printed)
    for name, limit in table["limits"].items():
        rate = f"{limit['gbytes_per_s']:.1f} GB/s" if limit["gbytes_per_s"] else f"{limit['gops']:.0f} GOPS"
        console.print(f"{name}: {rate} ({limit['how']})", highlight=False)
    for line in table["missing"]:
        console.print(line, highlight=False, soft_wrap=True)


def losses(table: Found) -> list[str]:
    """Our rows that are slower than the best peer of as many bits a code."""
    return [
        f"slower than {row['best_peer']} ({row['times_peer']:.2f}x): {row['name']} x {row['activations']}"
        for row in table["rows"]
        if row.get("times_peer") is not None and row["times_peer"] < 1
    ]


def slower_than_torch(table: Found) -> list[str]:
    """Our rows of less than 8 bits that one token is no faster through than torch's float layers."""
    return [
        f"slower than torch: {row['name']} x {row['activations']} {row['shape']}"
        for row in table["rows"]
        if row["engine"] == "fewbit" and row["bits"] < 8 and row["batch"] == 1
        if min(row["times_float32"], row["times_bfloat16"]) <= 1
    ]


def parse(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"rows x columns; default {', '.join(SHAPES)}")
    parser.add_argument("--batch", action="append", type=int, help="tokens; default 1")
    parser.add_argument("--format", action="append", help=f"default {', '.join(FORMATS)}")
    parser.add_argument(
        "--activation", action="append", help=f"default {', '.join(ACTIVATIONS)}; or bfloat16, int8/g64, ..."
    )
    parser.add_argument("--kernel", help="force an instruction set: avx512, avx2, neon, serial")
    parser.add_argument("--peer", action="append", choices=[*PEERS, "none"], help=f"default {', '.join(PEERS)}")
    parser.add_argument("--ggml", type=Path, help="folder that holds libggml-cpu, where it is not llama-cpp-python's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    help = "processor: what all threads of this process used, whatever else the machine does; for --threads 1 only"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=help)
    parser.add_argument("--cached", action="store_true", help="weights stay in the cache, instead of being rotated")
    parser.add_argument("--seconds", type=float, default=30, help="measuring time a table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture, e.g. kernels.png: time against true bits")
    arguments = parser.parse_args(words if words is None else list(words))
    if arguments.clock == "processor" and arguments.threads != 1:
        parser.error(f"--clock processor would add up {arguments.threads} threads; --threads 1 or --clock wall works")
    return arguments


def chosen(arguments: argparse.Namespace) -> list[Row]:
    peers = {
        "llama.cpp": llama_cpp.rows(arguments.ggml),
        "onnxruntime": onnx_runtime.rows(),
        "torchao": torch_ao.rows(),
    }
    formats, activations = arguments.format or FORMATS, arguments.activation or ACTIVATIONS
    rows = [*torch_linear.rows(), *fewbit_kernels.rows(formats, activations, arguments.kernel)]
    return rows + [row for name in arguments.peer or PEERS for row in peers.get(name, [])]


def main() -> int:
    arguments = parse()
    console = begun(arguments.threads, 165)
    about: Found = {
        "command": sys.argv,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "isas": native.isas(),
    }
    about |= {"machine": processor(), "system": platform.platform(), "python": platform.python_version()}
    about |= {"peers": versions()}
    tables, warnings = [], []
    for text in arguments.shape or SHAPES:
        for batch in arguments.batch or [1]:
            height, width = (int(part) for part in text.split("x"))
            tables.append(measure((height, width), batch, chosen(arguments), arguments))
            show(tables[-1], arguments.threads, console)
            warnings += slower_than_torch(tables[-1])
            for line in losses(tables[-1]):
                console.print(line, highlight=False)
    for line in warnings:
        console.print(line, highlight=False)
    found = {"about": about, "tables": tables}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.plot:
        plot.draw(found, arguments.plot)
    return 1 if warnings else 0


if __name__ == "__main__":
    sys.exit(main())
