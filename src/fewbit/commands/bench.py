# SPDX-License-Identifier: Apache-2.0
"""``fewbit bench``: speed of a quantized folder here, as ``fewbit.generate`` runs it, and of its kernels beside torch's
float ``linear``.

Candidates take turns within each round (A B C A B C), each goes through copies of its weight that together exceed twice
the last-level cache where that takes at most ``COPIES`` of them, and medians are reported.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewbit
from fewbit import doctor
from fewbit.commands.console import err, results, table, write_json
from fewbit.commands.generate import prepare
from fewbit.containers import manifest
from fewbit.containers.terms import summary
from fewbit.decode import Engine, open_engine
from fewbit.decode.native_engine import NativeEngine
from fewbit.kernels import Prepared
from fewbit.measure.machine import processor
from fewbit.model.layers import QuantLinear
from fewbit.report import numbers as N

COPIES = 128
ROUNDS = 5
SLICE = 0.02
"""Seconds that one candidate runs in one round, at least."""


@dataclass(frozen=True)
class Row:
    """Median seconds of one product (batch, columns) x (columns, rows) in three ways; ratios above 1: fewbit wins."""

    format: str
    kernel: str
    rows: int
    columns: int
    layers: int
    batch: int
    seconds: float
    fp32_seconds: float
    bf16_seconds: float
    times_fp32: float
    times_bf16: float
    gigabytes_per_s: float
    from_memory: bool


def run(
    out: Path,
    batches: tuple[int, ...],
    tokens: int,
    prompt: int,
    threads: int | None,
    activation: str | None,
    json_target: str | None,
) -> None:
    """Measure and print.

    Raises:
        InputError: ``out`` is no folder that fewbit wrote.
    """
    prepare(threads)
    manifest.read(out)
    speed = decode_speed(open_engine(out, activation=activation, sequences=1, threads=threads), tokens, prompt)
    model = fewbit.load(out, activation=activation)
    rows = [row for group in groups(model) for batch in batches for row in [kernel_row(*group, batch)]]
    found = {
        "path": str(out),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "torch": torch.__version__,
        **speed,
        "kernels": [asdict(row) for row in rows],
    }
    write_json(json_target, found)
    for shown in tables(found):
        results(json_target).print(shown)
    if found["prompt_tokens"] < prompt:
        err().print(f"note: the context has room for a prompt of {found['prompt_tokens']} tokens, not {prompt}")
    warn(rows)


def decode_speed(engine: Engine, tokens: int, prompt: int) -> dict[str, Any]:
    """Which engine runs, and its tokens a second: of a prompt read at once, at most as long as there is room for,
    and of ``tokens`` greedy ones after it. The median of three, after one that is not counted.

    Raises:
        InputError: the context has no room for ``tokens`` after one of the prompt.
    """
    prompt = max(1, min(prompt, engine.context - tokens))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.vocab_size, (prompt,), generator=generator).tolist()
    runs = [_timed(engine, ids, tokens) for _ in range(4)][1:]
    prefill, decode = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
    read = engine.read_bytes if isinstance(engine, NativeEngine) else None
    return {
        "engine": engine.name,
        "why": engine.why,
        "prefill_tokens_per_s": prompt / prefill,
        "decode_tokens_per_s": tokens / decode,
        "weight_gigabytes_per_s": None if read is None else read * tokens / decode / 1e9,
        "prompt_tokens": prompt,
        "decode_tokens": tokens,
    }


def _timed(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens after it."""
    sequence = engine.open()
    began = time.perf_counter()
    logits = engine.feed([(sequence, prompt)])
    read = time.perf_counter()
    for _ in range(tokens):
        logits = engine.feed([(sequence, [int(logits.argmax())])])
    done = time.perf_counter()
    engine.close(sequence)
    return read - began, done - read


def groups(model: Any) -> list[tuple[str, Prepared, int]]:
    """One weight for each format, shape and kernel among the linear layers: the format, the weight, and how many layers
    share them."""
    found: dict[tuple[str, tuple[int, int], str], tuple[str, Prepared, int]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            name = summary(module.plain)
            key = (name, module.shape, module.prepared.kernel)
            _, first, number = found.get(key, (name, module.prepared, 0))
            found[key] = (name, first, number + 1)
    return list(found.values())


def kernel_row(name: str, prepared: Prepared, layers: int, batch: int) -> Row:
    """One weight at one batch size, fewbit's kernel and torch's two in turns."""
    rows, columns = prepared.shape
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    target = 2 * doctor.cache_bytes()
    low = x.bfloat16()
    candidates = [
        _rotating([prepared, *(copy.deepcopy(prepared) for _ in range(_copies(prepared.nbytes, target) - 1))], x),
        _float(weight, x, target),
        _float(weight.bfloat16(), low, target),
    ]
    with torch.inference_mode():
        ours, fp32, bf16 = interleaved(candidates)
    return Row(
        name,
        prepared.kernel,
        rows,
        columns,
        layers,
        batch,
        ours,
        fp32,
        bf16,
        fp32 / ours,
        bf16 / ours,
        prepared.nbytes / ours / 1e9,
        prepared.nbytes * _copies(prepared.nbytes, target) >= target,
    )


def _copies(nbytes: int, target: int) -> int:
    return min(COPIES, max(1, -(-target // nbytes)))


def _rotating(copies: list[Any], x: Tensor) -> Callable[[], Any]:
    turn = cycle(copies)
    return lambda: next(turn)(x)


def _float(weight: Tensor, x: Tensor, target: int) -> Callable[[], Tensor]:
    number = _copies(weight.nbytes, target)
    turn = cycle([weight.clone() for _ in range(number)])
    return lambda: torch.nn.functional.linear(x, next(turn))


def interleaved(candidates: list[Callable[[], Any]]) -> list[float]:
    """Median seconds a call of each candidate; they take turns so that a busy moment slows all alike."""
    calls = []
    for candidate in candidates:
        candidate()
        began = time.perf_counter()
        candidate()
        calls.append(max(1, round(SLICE / max(time.perf_counter() - began, 1e-7))))
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for index, candidate in enumerate(candidates):
            began = time.perf_counter()
            for _ in range(calls[index]):
                candidate()
            times[index].append((time.perf_counter() - began) / calls[index])
    return [statistics.median(series) for series in times]


def tables(found: dict[str, Any]) -> list[Any]:
    """The model, then its kernels."""
    read = found["weight_gigabytes_per_s"]
    whole = [
        ("engine", found["engine"] if found["why"] is None else f"{found['engine']}: {found['why']}"),
        ("processor", f"{found['processor']}, {found['threads']} threads, torch {found['torch']}"),
        ("prefill", f"{N.significant(found['prefill_tokens_per_s'])} tokens/s ({found['prompt_tokens']} tokens)"),
        ("decode", f"{N.significant(found['decode_tokens_per_s'])} tokens/s ({found['decode_tokens']} tokens)"),
        *([] if read is None else [("weights read while decoding", f"{N.significant(read)} GB/s")]),
    ]
    rows = [
        (
            row["format"],
            row["kernel"],
            f"{row['rows']} x {row['columns']}",
            row["layers"],
            row["batch"],
            f"{1e6 * row['seconds']:.0f}",
            f"×{row['times_fp32']:.2f}",
            f"×{row['times_bf16']:.2f}",
            f"{row['gigabytes_per_s']:.1f}",
            "memory" if row["from_memory"] else "cache",
        )
        for row in found["kernels"]
    ]
    headers = ("format", "kernel", "shape", "layers", "batch", "us", "to fp32", "to bf16", "GB/s", "weights in")
    return [
        table(("speed here", ""), whole),
        table(headers, rows, "Kernels beside torch linear, same run; above ×1 fewbit is faster"),
    ]


def warn(rows: list[Row]) -> None:
    """Say which products lose to float."""
    losing = [row for row in rows if min(row.times_fp32, row.times_bf16) < 1]
    for row in losing:
        place = f"{row.format} {row.rows} x {row.columns} at batch {row.batch}"
        err().print(f"warning: {place} is slower than torch's float linear here", markup=False)
