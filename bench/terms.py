# SPDX-License-Identifier: Apache-2.0
"""What do outliers cost beside a dense matrix, and what do products of two sign matrices bring?

``python bench/terms.py [--shape 11008x4096] [--batch 1] [--format int3/g128] [--activation int8/channel]``

Every row of a table is measured in the same loop, one call of each in turn. Weights are rotated through more than three
times the last-level cache. "int3/g128 + sparse" is one call of a sum of both; "sparse" the same entries alone; "torch
CSR" torch's product of a CSR matrix of the same entries in float32, which adds onto nothing. "of stream" is the share
of a plain read stream that the bytes of a row reach ("bits": the same bytes, over all weights of the shape). "low-rank
signs" is a product of two sign matrices of rank 512; "signs, as many bytes" a dense matrix of signs with as many
columns, and as many rows as give it the bytes of the product; "torch float32" the full product. The error is the norm
of the difference to float64, of the weight that the row holds on activations as they came, over the norm of the answer,
on a sample of rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import limits
from fewbit import formats, kernels
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Dense, Product, Sparse, Term, Terms
from fewbit.kernels import native
from peers import fewbit_kernels
from peers.row import ROTATE, SAMPLE, Call
from session import begun
from timing import interleaved

OUTLIERS, RANK = 0.0045, 512
SIGN = formats.parse("sign/channel")
Found = dict[str, Any]
Row = tuple[Found, Callable[[], Call]]
"""What a row is, and a maker of calls, each with a copy of its own."""


def outliers(shape: tuple[int, int]) -> Sparse:
    """Entries at random places, of several times the size of other weights."""
    here = torch.rand(shape) < OUTLIERS
    return Sparse.of(torch.where(here, 3 * torch.randn(shape), 0.0))


def signs(rows: int, columns: int) -> QTensor:
    scale = (torch.rand(rows, 1, 1) + 0.5).half()
    return QTensor.of(SIGN, torch.randint(0, 2, (rows, columns), dtype=torch.uint8), {"scale": scale})


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    answer = x.double() @ weight[:SAMPLE].double().T
    return float((y[:, :SAMPLE].double() - answer).norm() / answer.norm())


def ours(name: str, term: Term, x: Tensor, activation: str) -> Row:
    inputs = None if activation == fewbit_kernels.FLOAT else formats.parse(activation)
    whole = term if isinstance(term, Terms) else Terms(term.shape, (term,))
    ready = kernels.prepare(whole, activation=inputs)
    row = {"name": name, "kernel": ready.kernel, "x": activation, "bytes": ready.read_bytes}
    row["error"] = error(ready(x), x, term.dequantize())

    def make() -> Call:
        twin = kernels.prepare(whole, activation=inputs)
        return lambda: twin(x)

    return row, make


def torch_csr(sparse: Sparse, x: Tensor) -> Row:
    def matrix() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "in beta state"
            return torch.sparse_csr_tensor(
                sparse.pointers.clone(), sparse.columns.to(torch.int32), sparse.values.float(), sparse.shape
            )

    nbytes, columns = 8 * sparse.values.numel() + 4 * sparse.pointers.numel(), x.T.contiguous()
    row = {"name": "torch CSR", "kernel": "torch", "x": fewbit_kernels.FLOAT, "bytes": nbytes}
    row["error"] = error((matrix() @ columns).T, x, sparse.dequantize())

    def make() -> Call:
        held = matrix()
        return lambda: held @ columns

    return row, make


def torch_float(weight: Tensor, x: Tensor) -> Row:
    row = {"name": "torch float32", "kernel": "torch", "x": fewbit_kernels.FLOAT, "bytes": 4 * weight.numel()}
    row["error"] = error(x @ weight.T, x, weight)

    def make() -> Call:
        held = weight.clone()
        return lambda: torch.nn.functional.linear(x, held)

    return row, make


def with_outliers(shape: tuple[int, int], x: Tensor, spellings: list[str], activations: list[str]) -> list[Row]:
    few = outliers(shape)
    made = [ours("sparse", few, x, fewbit_kernels.FLOAT), torch_csr(few, x)]
    for spelling in spellings:
        dense = Dense(fewbit_kernels.random(formats.parse(spelling), shape))
        for activation in activations:
            made.append(ours(spelling, dense, x, activation))
            made.append(ours(f"{spelling} + sparse", Terms(shape, (dense, few)), x, activation))
    return made


def low_rank(shape: tuple[int, int], x: Tensor, activations: list[str]) -> list[Row]:
    (rows, columns), made = shape, list[Row]()
    product = Product(signs(rows, RANK), torch.rand(RANK), signs(RANK, columns))
    same = Dense(signs(RANK * (rows + columns) // columns, columns))
    for activation in activations:
        made.append(ours("low-rank signs", product, x, activation))
        made.append(ours("signs, as many bytes", same, x, activation))
    return [*made, torch_float(torch.randn(shape), x)]


def measure(made: list[Row], shape: tuple[int, int], options: argparse.Namespace) -> list[Found]:
    stream = limits.read_stream(options.threads)
    first = {"name": stream.name, "kernel": "-", "x": "-", "bytes": stream.nbytes, "error": None}
    rows = [first, *(row for row, _ in made)]
    turns = [1 if options.cached else -(-ROTATE // row["bytes"]) for row in rows[1:]]
    calls = [[make() for _ in range(turn)] for (_, make), turn in zip(made, turns, strict=True)]
    times = interleaved([stream.calls, *calls], options.seconds, 0.0, True, time.perf_counter)
    for row, found in zip(rows, times, strict=True):
        row |= {"seconds": statistics.median(found), "least": min(found), "shape": list(shape)}
        row["gbytes_per_s"] = row["bytes"] / row["seconds"] / 1e9
        row["of_stream"] = row["gbytes_per_s"] / first["gbytes_per_s"]
        row["bits"] = 8 * row["bytes"] / (shape[0] * shape[1])
    return rows


def show(rows: list[Found], title: str, console: Console) -> None:
    table = Table(title=title)
    for name in ("", "kernel", "x", "bits", "us", "least us", "GB/s", "of stream", "error"):
        table.add_column(name, justify="left" if name in ("", "kernel", "x") else "right")
    for row in rows:
        bits = "-" if row["kernel"] == "-" else f"{row['bits']:.2f}"
        speed = f"{row['seconds'] * 1e6:.0f}", f"{row['least'] * 1e6:.0f}", f"{row['gbytes_per_s']:.1f}"
        wrong = "-" if row["error"] is None else f"{row['error']:.1e}"
        table.add_row(row["name"], row["kernel"], row["x"], bits, *speed, f"{row['of_stream']:.0%}", wrong)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows x columns; default 4096x4096 and 11008x4096")
    parser.add_argument("--batch", action="append", type=int, help="tokens; default 1, 8 and 128")
    parser.add_argument("--format", action="append", help="default int3/g128 and int4/g128")
    parser.add_argument("--activation", action="append", help="default float32 and int8/channel")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="a table; default 10")
    parser.add_argument("--cached", action="store_true", help="one copy of each weight, which may stay in the cache")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = begun(options.threads, 140)
    activations = options.activation or [fewbit_kernels.FLOAT, "int8/channel"]
    rows = []
    for text in options.shape or ["4096x4096", "11008x4096"]:
        height, width = (int(part) for part in text.split("x"))
        for batch in options.batch or [1, 8, 128]:
            x = torch.randn(batch, width)
            for made in (
                with_outliers((height, width), x, options.format or ["int3/g128", "int4/g128"], activations),
                low_rank((height, width), x, activations),
            ):
                found = measure(made, (height, width), options)
                show(found, f"{text}, batch {batch}, {options.threads} thread{'s' * (options.threads > 1)}", console)
                rows += [row | {"batch": batch} for row in found]
    if options.json:
        about = {"command": sys.argv, "torch": torch.__version__, "isas": native.isas()}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
