# SPDX-License-Identifier: Apache-2.0
"""How fast is text generated, beside llama.cpp and torch, and beside what the memory allows?

    python bench/decode.py MODEL.gguf --work DIR --threads 1 --json decode.json

MODEL, a GGUF file or a Hugging Face folder, is quantized by rounding, or by the method after a space ("sign/channel
nanoquant"), to each --format into DIR, once. Every row runs in a process of its own (its peak memory is its own),
loaded once; then rows take turns, so that a noisy moment hits all alike: a prompt is prefilled, then some tokens are
decoded after a context, then memory is read. The limit of decoding is the rate of that read, median of the run, over
the bytes of weights that a token reads; keys and values come on top. Energy is that of the processor package while a
row decodes, whatever else runs on it; ``-`` where its counters cannot be read.

Our rows are formats times --activation (``-``: inputs stay float). llama.cpp requantizes the GGUF file to each --llama
type, as ``llama-quantize`` does without an importance matrix; it needs the package:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import fewbit
import limits
from fewbit.measure.energy import Meter, meter
from session import begun

FORMATS = ["int8/g64", "int4/g64", "int3/g64", "int2/g64", "sign/g64", "nf4/g64"]
ACTIVATIONS = ["-", "int8/channel"]
LLAMA = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10, "BF16": 32}
"""Names of ``llama_ftype``, and their numbers in llama.h."""
ENGINES = Path(__file__).with_name("decode_engines.py")
Found = dict[str, Any]


@dataclass
class Row:
    """One engine on one model, and what was measured of it."""

    name: str
    kind: str
    model: Path
    option: str
    found: Found = field(default_factory=dict)
    process: Any = None

    def start(self, threads: int) -> str | None:
        """Load it; None, or why not."""
        command = [sys.executable, "-W", "ignore", str(ENGINES), self.kind, str(self.model), self.option, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if not line:
            last = self.process.stderr.read().strip().splitlines()
            return f"{self.name}: {last[-1] if last else 'it said nothing'}"
        self.found |= json.loads(line) | {"prefill": [], "decode": [], "streams": [], "joules": []}
        return None

    def ask(self, **asked: int) -> Found:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def ours(arguments: argparse.Namespace) -> list[Row]:
    """A folder for each format, quantized unless it is there."""
    rows = []
    for spelt in arguments.format or FORMATS:
        format, _, method = spelt.partition(" ")
        folder = arguments.work / spelt.replace("/", "-").replace(" ", "-")
        if not folder.is_dir():
            fewbit.quantize(str(arguments.model), format, method=method or "rtn", out=folder, force=True)
        rows += [
            Row(f"fewbit {spelt}" + ("" if option == "-" else f" x {option}"), "fewbit", folder, option)
            for option in arguments.activation or ACTIVATIONS
        ]
    return rows


def theirs(arguments: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of llama.cpp and torch, and why some are missing."""
    rows = [] if arguments.no_torch else [Row("torch bfloat16", "transformers", arguments.model, "bfloat16")]
    if importlib.util.find_spec("llama_cpp") is None:
        return rows, ["llama.cpp: the package llama-cpp-python is not installed; see --help"]
    if arguments.model.suffix != ".gguf":
        return rows, ["llama.cpp: the model is no GGUF file"]
    from llama_cpp import llama_cpp as c

    quiet = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(quiet, None)
    for name in arguments.llama or LLAMA:
        path = arguments.work / f"{name}.gguf"
        if not path.exists():
            parameters = c.llama_model_quantize_default_params()
            parameters.ftype, parameters.allow_requantize = LLAMA[name], True
            code = c.llama_model_quantize(str(arguments.model).encode(), str(path).encode(), parameters)
            if code:
                return rows, [f"llama.cpp: llama_model_quantize to {name} failed"]
        rows.append(Row(f"llama.cpp {name}", "llama.cpp", path, "-"))
    return rows, []


def metered(energy: Meter, row: Row, **asked: int) -> Found:
    """The answer of ``row``, and the joules that passed meanwhile where ``energy`` has a source."""
    before = energy.read() if energy.source else {}
    found = row.ask(**asked)
    return found | ({"joules": energy.joules(before, energy.read())} if energy.source else {})


def measure(rows: list[Row], energy: Meter, arguments: argparse.Namespace) -> float:
    """Rounds in which each row takes its turn; bytes a second of a read, the median of all rounds."""
    limit, rates, turn = limits.read_stream(arguments.threads), [], 0
    stop = time.perf_counter() + arguments.seconds
    clock = {"wall": time.perf_counter, "processor": time.process_time}[arguments.clock]
    while time.perf_counter() < stop or turn < 3:
        for row in rows:
            row.found["prefill"].append(row.ask(prefill=arguments.prompt)[arguments.clock])
            decode = {"decode": arguments.tokens, "context": arguments.context}
            decoded = metered(energy, row, **decode)
            row.found["decode"].append(decoded[arguments.clock])
            row.found["joules"] += [decoded["joules"]] if "joules" in decoded else []
            if arguments.streams and row.kind != "llama.cpp":
                row.found["streams"].append(row.ask(streams=arguments.streams, **decode)[arguments.clock])
            limit.calls[turn % len(limit.calls)]()  # what ran before this left cold
            began = clock()
            limit.calls[(turn + 1) % len(limit.calls)]()
            rates.append(limit.nbytes / (clock() - began))
        turn += 1
    return statistics.median(rates)


def summarize(row: Row, rate: float, arguments: argparse.Namespace) -> None:
    found = row.found
    found |= row.ask()
    found["prefill_tokens_per_s"] = arguments.prompt / statistics.median(found["prefill"])
    found["first_token_s"] = statistics.median(found["prefill"])
    found["decode_tokens_per_s"] = arguments.tokens / statistics.median(found["decode"])
    found["joules_per_token"] = statistics.median(found["joules"]) / arguments.tokens if found["joules"] else None
    if found["streams"]:
        found["streams_tokens_per_s"] = arguments.streams * arguments.tokens / statistics.median(found["streams"])
    found["limit_tokens_per_s"] = rate / found["read"] if found["read"] else None
    found["of_limit"] = found["decode_tokens_per_s"] / found["limit_tokens_per_s"] if found["read"] else None
    found["file_bytes"] = (
        row.model.stat().st_size
        if row.model.is_file()
        else sum(path.stat().st_size for path in row.model.glob("*.safetensors"))
    )


def show(rows: list[Row], rate: float, arguments: argparse.Namespace, console: Any) -> None:
    threads = f"{arguments.threads} thread{'s' * (arguments.threads > 1)}"
    clock = "processor time" if arguments.clock == "processor" else "wall time"
    title = f"prompt of {arguments.prompt}, {arguments.tokens} tokens after {arguments.context}, {threads}, {clock}"
    table = Table(title=title)
    streams = [f"{arguments.streams} texts/s"] if arguments.streams else []
    names = [
        "row",
        "MB/token",
        "prefill/s",
        "decode/s",
        "limit/s",
        "of limit",
        *streams,
        "J/token",
        "first s",
        "load s",
        "peak MB",
    ]
    for name in names:
        table.add_column(name, justify="left" if name == "row" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row.found["decode_tokens_per_s"]):
        f = row.found
        table.add_row(
            row.name,
            f"{f['read'] / 1e6:.1f}",
            f"{f['prefill_tokens_per_s']:.0f}",
            f"{f['decode_tokens_per_s']:.1f}",
            f"{f['limit_tokens_per_s']:.0f}" if f["read"] else "",
            f"{f['of_limit']:.0%}" if f["read"] else "",
            *([f"{f['streams_tokens_per_s']:.0f}" if f["streams"] else ""] if streams else []),
            "-" if f["joules_per_token"] is None else f"{f['joules_per_token']:.3f}",
            f"{f['first_token_s']:.3f}",
            f"{f['loaded']:.1f}",
            f"{f['peak'] / 1e6:.0f}",
            style="bold" if row.kind == "fewbit" else "",
        )
    console.print(table)
    console.print(f"read stream: {rate / 1e9:.1f} GB/s", highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where quantized models are kept between runs")
    parser.add_argument("--format", action="append", help=f"default {', '.join(FORMATS)}; a method may follow")
    parser.add_argument("--activation", action="append", help=f"default {', '.join(ACTIVATIONS)}; +int8: keys in int8")
    parser.add_argument("--llama", action="append", choices=list(LLAMA), help=f"default {', '.join(LLAMA)}")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--streams", type=int, default=0, help="texts decoded side by side as well, at most 16; ours")
    parser.add_argument("--seconds", type=float, default=60)
    help = "processor: what all threads of a process used, whatever else the machine does; for --threads 1 only"
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help=help)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.clock == "processor" and arguments.threads != 1:
        parser.error("--clock processor would add up threads; --threads 1 or --clock wall works")
    return arguments


def main() -> int:
    arguments = parse()
    console = begun(arguments.threads, 140)
    arguments.work.mkdir(parents=True, exist_ok=True)
    peers, missing = theirs(arguments)
    rows = []
    for row in ours(arguments) + peers:
        reason = row.start(arguments.threads)
        if reason is None:
            rows.append(row)
        else:
            missing.append(reason)
    energy = meter()
    if not energy.source:
        missing.append(f"energy: {energy.unavailable}")
    rate = measure(rows, energy, arguments)
    for row in rows:
        summarize(row, rate, arguments)
        row.stop()
    show(rows, rate, arguments, console)
    for line in missing:
        console.print(line, highlight=False, soft_wrap=True)
    if arguments.json:
        kept = [{"name": row.name, "kind": row.kind} | row.found for row in rows]
        about = {"command": sys.argv, "torch": torch.__version__, "read_bytes_per_s": rate, "missing": missing}
        arguments.json.write_text(json.dumps(about | {"rows": kept}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
