# SPDX-License-Identifier: Apache-2.0
"""Other people's quantizers and ours: same float model, same calibration tokens, same windows, one command.

    python bench/quantizers.py stories15m --peers PEERS --text samples.txt --calibration stories.txt --json rows.json

PEERS/NAME is what ``pip install --no-deps --target PEERS/NAME NAME`` leaves, for the packages of :data:`ROWS`;
PEERS/deps, where it is there, what they share. Linear layers but the head are quantized, each row in a process of its own on one
thread, and what the layers decode to is put into the float model and scored: activations are float everywhere. Seconds go
from the model's folder to quantized layers in memory; fewbit's also write and check the file. Rows that are in the file
``--json`` already are not run again; those of a peer that fails are listed with its last words.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from accuracy import logits
from fewbit import calibrate
from fewbit.measure.accuracy import Scores, score, summarize

ROWS: tuple[tuple[str, str, tuple[int, ...], str], ...] = (
    ("fewbit", "gptq act-order", (8, 4, 3, 2), "int{bits}/g32/asym gptq act-order"),
    ("gptqmodel", "gptq desc_act", (8, 4, 3, 2), "desc_act"),
    ("gptqmodel", "gptq", (8, 4, 3, 2), ""),
    ("llmcompressor", "gptq act-order", (8, 4, 3, 2), "weight"),
    ("fewbit", "autoround", (8, 4, 3, 2), "int{bits}/g32/asym autoround"),
    ("autoround", "autoround", (8, 4, 3, 2), ""),
    ("fewbit", "gptq act-order > rounding", (3, 2), "int{bits}/g32/asym gptq act-order > rounding"),
    ("fewbit", "rtn", (8, 4, 3, 2), "int{bits}/g32/asym rtn"),
    ("torchao", "intx", (8, 4, 3, 2), ""),
    ("fewbit", "hqq", (8, 4, 3, 2), "int{bits}/g64/min hqq"),
    ("hqq", "hqq", (8, 4, 3, 2), ""),
    ("quanto", "max", (8, 4, 2), ""),
    ("fewbit", "nf4 clip", (4,), "nf4/g64/dq clip"),
    ("bitsandbytes", "nf4", (4,), "nf4"),
    ("fewbit", "vptq", (2,), "vector4x8 vptq"),
    ("gptqmodel", "vptq", (2,), "vptq"),
)
"""Package, what the table calls it, bits, and the setting that its side in ``quantizer_sides.py`` is given."""
FOLDERS = {"autoround": "auto-round", "quanto": "optimum-quanto"}
"""Of packages that are not called as their side is."""
LAST_WORDS = 300


def environment(peer: str, folder: Path) -> dict[str, str]:
    """``PYTHONSAFEPATH``: transformers looks for a package `kernels`, which the file beside this one is not."""
    here = (
        [str(Path(__file__).parent)]
        if peer == "fewbit"
        else [str(folder / FOLDERS.get(peer, peer)), str(folder / "deps")]
    )
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    # gptqmodel asks for two workers where it grants itself one, on machines of two cores
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(here + before)}


def quantized(arguments: argparse.Namespace, scratch: Path, peer: str, what: str, bits: int) -> dict[str, Any]:
    """What one side says of itself, with ``weights``; or its last words as ``failed``."""
    out = scratch / "out.safetensors"
    for old in (out, out.with_suffix(".json")):
        old.unlink(missing_ok=True)
    side = Path(__file__).parent / "quantizer_sides.py"
    command = [sys.executable, str(side), peer, str(arguments.model), str(scratch / "tokens.safetensors"), str(out)]
    command += ["--bits", str(bits), "--iters", str(arguments.iters), "--what", what.format(bits=bits)]
    command += ["--text", str(arguments.calibration)] if arguments.calibration else []
    done = subprocess.run(
        command, env=environment(peer, arguments.peers), cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        return {"failed": done.stdout.decode(errors="replace").strip()[-LAST_WORDS:]}
    return {**json.loads(out.with_suffix(".json").read_text()), "weights": load_file(out)}


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a package, method and size."""
    words = AutoTokenizer.from_pretrained(arguments.model)
    text = calibrate.heldout_text() if arguments.text is None else calibrate.read_text(arguments.text)
    windows = calibrate.windows(words, text, arguments.context, "text")[: arguments.windows]
    drawn = calibrate.calibration(words, arguments.calibration, arguments.samples, arguments.context, 0).ids
    reference, twin = (AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) for _ in range(2))
    wanted = [logits(reference, ids) for ids in windows]
    layers = sum(isinstance(m, torch.nn.Linear) for m in reference.modules()) - 1
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json and arguments.json.exists() else []
    there = {(row["package"], row["method"], row["asked"]) for row in rows}
    with TemporaryDirectory() as scratch:
        save_file({"calibration": drawn}, Path(scratch) / "tokens.safetensors")
        for bits in arguments.bits:
            for peer, name, sizes, what in ROWS:
                if bits not in sizes or (peer, name, bits) in there or peer not in arguments.packages:
                    continue
                found = quantized(arguments, Path(scratch), peer, what, bits)
                row = {"package": peer, "method": name, "asked": bits, **found}
                made = row.pop("weights", None)
                if made is not None:
                    if len(made) != layers:
                        raise SystemExit(f"{peer} {name} quantized {len(made)} of {layers} layers")
                    with torch.no_grad():
                        for layer, weight in made.items():
                            twin.get_submodule(layer).weight.copy_(weight)
                    scored: list[Scores] = [score(logits(twin, i), i, w) for i, w in zip(windows, wanted, strict=True)]
                    row |= summarize(scored)
                rows.append(row)
                print(json.dumps({key: row[key] for key in row if "quantiles" not in key}), flush=True)
                if arguments.json:
                    told = {key: str(value) for key, value in vars(arguments).items()}
                    arguments.json.write_text(json.dumps({"arguments": told, "rows": rows}, indent=1) + "\n")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table, by bits asked for and KL."""
    table = Table()
    for column in ("package", "method", "bits", "perplexity", "KL mean", "top-1", "cpu s", "wall s", "peak MiB"):
        table.add_column(column, justify="left" if column in ("package", "method") else "right")
    for row in sorted(rows, key=lambda row: (-row["asked"], row.get("kl_mean", 0.0))):
        if "failed" in row:
            table.add_row(row["package"], row["method"], str(row["asked"]), "failed")
            continue
        table.add_row(
            row["package"],
            row["method"],
            f"{row['bits']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl_mean']:.4f} ± {row['kl_mean_stderr']:.4f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['cpu_seconds']:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_rss_bytes'] / 2**20:.0f}",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="a folder with a folder a package")
    parser.add_argument("--packages", nargs="+", default=sorted({row[0] for row in ROWS}))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2, 8])
    parser.add_argument("--text", type=Path, help="evaluation text; bundled held-out text by default")
    parser.add_argument("--calibration", type=Path, help="calibration text; bundled by default")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--iters", type=int, default=200, help="steps of tunings")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("model", "peers", "text", "calibration"):  # sides run elsewhere
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name).resolve())
    show(run(arguments))


if __name__ == "__main__":
    main()
