# SPDX-License-Identifier: Apache-2.0
"""``bench/kernels.py``: every row multiplies by the weight that it says it holds, missing peers are seen, and ours are
held against the right ones."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fewbit.kernels import native

BENCH = Path(__file__).parents[2] / "bench"
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The command as a module. Its folder leaves sys.path at once: transformers looks for a package ``kernels``."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("kernels")
    finally:
        sys.path.remove(str(BENCH))
        del sys.modules["kernels"]


def bound(activations: str) -> float:
    """Relative error that rounding x so costs: a uniform error of one step, which is the range (for a normal x of 512
    columns and 3 tokens below 9 of its deviations) over 2^bits; or half a unit in the last place of x and y each."""
    floats = {"float32": 512 * 2**-24, "bfloat16": 2**-8, "float16": 2**-11}
    bits = {"int8": 8, "int7": 7}.get(activations.partition("/")[0])
    return floats[activations] if bits is None else 9 / 2**bits / math.sqrt(12) * 1.3


@needs_native
def test_every_row_multiplies_by_what_it_holds(bench: ModuleType) -> None:
    torch.manual_seed(0)
    arguments = bench.parse([])
    problem = bench.Problem(torch.randn(192, 512), torch.randn(3, 512), threads=1, cached=True)
    made, missing = bench.prepared(bench.chosen(arguments), problem)
    errors = {
        f"{row.engine} {row.name} x {row.activations}": (ready.error(problem.x), bound(row.activations))
        for row, ready in made
    }
    assert {name: found for name, found in errors.items() if not found[0] <= found[1]} == {}
    engines = {row.engine for row, _ in made} | {line.split()[2] for line in missing}
    assert engines >= {"fewbit", "torch", "torchao", "onnxruntime", "llama.cpp"}
    assert all(row.codes <= 8 * ready.nbytes / (192 * 512) or "TQ1" in row.name for row, ready in made)


def test_a_missing_peer_says_how_to_get_it(bench: ModuleType, tmp_path: Path) -> None:
    problem = bench.Problem(torch.randn(64, 256), torch.randn(1, 256), threads=1, cached=True)
    made, missing = bench.prepared(bench.llama_cpp.rows(tmp_path), problem)
    assert made == []
    (line,) = missing
    assert line.startswith("not measured: llama.cpp F16, BF16, Q8_0") and "pip install" in line


def row(engine: str, codes: int, bits: float, seconds: float, **more: Any) -> dict[str, Any]:
    plain = {"name": f"{codes}", "integer": True, "gbytes_per_s": 20.0, "gops": 50.0}
    return plain | {"engine": engine, "codes": codes, "bits": bits, "seconds": seconds} | more


def test_ours_are_held_against_the_right_peers(bench: ModuleType) -> None:
    rows = [
        row("torch", 32, 32, 8.0, name="float32", integer=False),
        row("llama.cpp", 4, 4.5, 2.0),
        row("onnxruntime", 4, 4.25, 3.0),
        row("llama.cpp", 2, 2.0, 0.5),
        row("llama.cpp", 8, 8.5, 1.5),
        row("fewbit", 4, 4.25, 1.0),
    ]
    limits = {"read stream": {"gbytes_per_s": 40.0}, "int8 peak": {"gops": 200.0}}
    bench.compare(rows, limits)
    ours = rows[-1]
    assert (ours["times_peer"], ours["best_peer"]) == (2.0, "llama.cpp 4")
    assert (ours["times_fewer"], ours["best_fewer"]) == (0.5, "llama.cpp 2")
    assert (ours["times_more"], ours["best_more"]) == (1.5, "llama.cpp 8")
    assert (ours["of_stream"], ours["of_peak"], ours["times_float32"]) == (0.5, 0.25, 8.0)
    assert rows[0]["of_peak"] is None  # no float32 peak was measured


def test_a_slow_row_sits_out(bench: ModuleType) -> None:
    calls = [[lambda: time.sleep(0.05)], *([lambda: None] for _ in range(9))]
    slow, *fast = bench.interleaved(calls, 0.3, 0.0, False, time.perf_counter)
    assert len(slow) == 3
    assert all(len(times) > 3 for times in fast)


def test_onnx_weights_are_packed_lowest_bits_first(bench: ModuleType) -> None:
    codes = torch.randint(0, 4, (3, 64), dtype=torch.uint8)
    packed = bench.onnx_runtime.pack(codes, 2, 32)
    assert packed.shape == (3, 2, 8)
    fields = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
    assert torch.equal(fields.reshape(3, 64), codes)


@needs_native
def test_the_command_writes_what_it_measured(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    words = ["--cached", "--shape", "70x256", "--batch", "1", "--batch", "3", "--threads", "1", "--seconds", "0.05"]
    words += ["--format", "int4/g32", "--format", "nf4/g16", "--peer", "llama.cpp", "--ggml", str(tmp_path)]
    code, shown = command("kernels.py", *words, "--json", path)
    assert code in (0, 1)
    assert "not measured: llama.cpp" in shown and "not measured: fewbit nf4/g16" in shown
    first, second = json.loads(path.read_text())["tables"]
    assert (first["batch"], second["batch"]) == (1, 3)
    assert {row["engine"] for row in first["rows"]} == {"fewbit", "torch"}
    assert first["limits"]["read stream"]["gbytes_per_s"] > 0
    assert all(row["calls"] >= 3 and row["seconds"] > 0 for row in first["rows"] + second["rows"])


def test_the_picture_shows_every_row(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    rows = [row("fewbit", 4, 4.1, 1e-3), row("llama.cpp", 4, 4.5, 1.1e-3), row("onnxruntime", 4, 4.5, 9.0)]
    limits = {"read stream": {"gbytes_per_s": 40.0}, "int8 peak": {"gops": 200.0}}
    table = {"rows": rows, "shape": [64, 64], "batch": 1, "limits": limits}
    path = tmp_path / "kernels.svg"
    bench.plot.draw({"about": {"machine": "this one", "threads": 1}, "tables": [table]}, path)
    assert path.read_bytes().startswith(b"<?xml")
