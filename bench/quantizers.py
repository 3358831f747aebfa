# SPDX-License-Identifier: Apache-2.0
"""Other people's quantizers and ours: same float model, same calibration tokens, same windows, one command.

    python bench/quantizers.py stories15m --peers PEERS --text samples.txt --calibration stories.txt --json rows.json

PEERS/NAME is what ``pip install --no-deps --target PEERS/NAME NAME`` leaves, for the packages of :data:`ROWS`, and
PEERS/deps what they share. Linear layers but the head are quantized, on one thread and in one process a package, and
what they decode to is put into the float model and scored, and norms that a package changes. Activations are float but
in rows of W8A8, where the inputs of a layer, once it has scaled them, are rounded to 8 bits token by token. Seconds go
from the model's folder and the text to quantized layers in memory, imports left out; ``of it loading`` are those until
the float model is there. Where data is used, fewbit's and llm-compressor's also write the file, and fewbit's check it.
Rows that are in the file ``--json`` already are not run again; of those that fail, why is listed.
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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from accuracy import logits
from fewbit import calibrate
from fewbit.measure.accuracy import score, summarize

ROWS: tuple[tuple[str, str, tuple[int, ...], str], ...] = (
    ("fewbit", "gptq act-order", (8, 4, 3, 2), "int{bits}/g32/asym gptq act-order"),
    ("fewbit", "gptq act-order, plain ranges", (8,), "int{bits}/g32/asym gptq act-order, plain ranges"),
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
    ("fewbit", "nf4 rtn", (4,), "nf4/g64/dq rtn"),
    ("bitsandbytes", "nf4", (4,), "nf4"),
    ("fewbit", "awq", (4, 3), "int{bits}/g32/asym awq"),
    ("llmcompressor", "awq", (4, 3), "awq"),
    ("fewbit", "palette", (4, 3, 2), "palette{bits} rtn"),
    ("coremltools", "palette", (4, 3, 2), ""),
    ("fewbit", "palette rows16", (4, 3, 2), "palette{bits}/rows16 rtn"),
    ("coremltools", "palette rows16", (4, 3, 2), "16"),
    ("fewbit", "W8A8 smooth", (8,), "W8A8 smooth 0.5"),
    ("llmcompressor", "W8A8 smooth", (8,), "smooth"),
    ("fewbit", "vptq", (2,), "vector4x8 vptq"),
    ("gptqmodel", "vptq", (2,), "vptq"),
    ("fewbit", "vptq rows", (2,), "vector4x8 vptq rows"),
    ("gptqmodel", "vptq rows", (2,), "vptq rows"),
    ("fewbit", "vptq two books", (2,), "vector4x5+4 vptq"),
    ("gptqmodel", "vptq two books", (2,), "vptq two books"),
)
"""Package, what the table calls it, bits, and the setting that its side in ``quantizer_sides.py`` is given."""
FOLDERS = {"autoround": "auto-round", "quanto": "optimum-quanto"}
"""Of packages that are not called as their side is."""
TUNERS = ("fewbit", "autoround")
"""Sides that run where ``--device`` says; the others on the processor."""
LAST_WORDS = 300


def environment(peer: str, folder: Path, device: str) -> dict[str, str]:
    """``PYTHONSAFEPATH``: transformers looks for a package `kernels`, which the file beside this one is not."""
    here = (
        [str(Path(__file__).parent)]
        if peer == "fewbit"
        else [str(folder / FOLDERS.get(peer, peer)), str(folder / "deps")]
    )
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    # gptqmodel asks for two workers where it grants itself one, on machines of two cores
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    fixed |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(here + before)}


def quantized(told: argparse.Namespace, folder: Path, peer: str, jobs: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """What one side says of each of ``jobs``, bits and setting, with ``weights``; or ``failed``, why."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    side = Path(__file__).parent / "quantizer_sides.py"
    device = told.device if peer in TUNERS else "cpu"
    command = [sys.executable, str(side), peer, str(told.model), str(folder), "--iters", str(told.iters)]
    command += ["--device", device]
    command += ["--text", str(told.calibration)] if told.calibration else []
    where = environment(peer, told.peers, device)
    done = subprocess.run(command, env=where, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    found = []
    for number in range(len(jobs)):
        said, weights = folder / f"{number}.json", folder / f"{number}.safetensors"
        last = {"failed": done.stdout.decode(errors="replace").strip()[-LAST_WORDS:]}
        found.append(json.loads(said.read_text()) if said.exists() else last)
        if weights.exists():
            found[-1]["weights"] = load_file(weights)
    return found


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a package, method and size."""
    words = AutoTokenizer.from_pretrained(arguments.model)
    text = calibrate.heldout_text() if arguments.text is None else calibrate.read_text(arguments.text)
    windows = calibrate.windows(words, text, arguments.context, "text")[: arguments.windows]
    drawn = calibrate.calibration(words, arguments.calibration, arguments.samples, arguments.context, 0).ids
    reference, twin = (AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) for _ in range(2))
    wanted = [logits(reference, ids) for ids in windows]
    layers = sum(isinstance(m, torch.nn.Linear) for m in reference.modules()) - 1
    kept: Path | None = arguments.json
    rows = json.loads(kept.read_text())["rows"] if kept is not None and kept.exists() else []
    there = {(row["package"], row["method"], row["asked"]) for row in rows}
    for peer in arguments.packages:
        rows_of = [row[1:] for row in ROWS if row[0] == peer and (not arguments.methods or row[1] in arguments.methods)]
        asked = [(name, bits, what) for bits in arguments.bits for name, sizes, what in rows_of if bits in sizes]
        asked = [one for one in asked if (peer, *one[:2]) not in there]
        with TemporaryDirectory() as scratch:
            save_file({"calibration": drawn}, Path(scratch) / "tokens.safetensors")
            jobs = [(bits, what.format(bits=bits)) for _, bits, what in asked]
            found = quantized(arguments, Path(scratch), peer, jobs) if jobs else []
        for (name, bits, _), row in zip(asked, found, strict=True):
            if (made := row.pop("weights", None)) is not None:
                if (there_are := sum(weight.ndim == 2 for weight in made.values())) != layers:
                    raise SystemExit(f"{peer} {name} quantized {there_are} of {layers} layers")
                twin.load_state_dict(reference.state_dict())
                row |= scored(twin, made, windows, wanted)
            rows.append({"package": peer, "method": name, "asked": bits, **row})
            print(json.dumps({key: value for key, value in rows[-1].items() if "kl_q" not in key}), flush=True)
        if kept is not None:
            told = {key: str(value) for key, value in vars(arguments).items()}
            kept.write_text(json.dumps({"arguments": told, "rows": rows}, indent=1) + "\n")
    return rows


@torch.no_grad()
def scored(twin: Any, made: dict[str, Tensor], windows: Tensor, wanted: list[Tensor]) -> dict[str, Any]:
    """Figures of ``twin`` with the weights ``made``, beside the logits ``wanted``. What ``made`` has as "LAYER.input"
    scales the inputs of a layer, which are rounded then."""
    handles = []
    for path, values in made.items():
        layer, _, what = path.rpartition(".")
        if what == "input":
            hook = lambda _, arguments, by=values: (rounded(arguments[0] * by),)  # noqa: E731
            handles.append(twin.get_submodule(layer).register_forward_pre_hook(hook))
        else:
            twin.get_submodule(path).weight.copy_(values)
    found = summarize([score(logits(twin, ids), ids, other) for ids, other in zip(windows, wanted, strict=True)])
    for handle in handles:
        handle.remove()
    return found


def rounded(x: Tensor) -> Tensor:
    """``x`` on 8 bits, a scale a token, zero in the middle: -128 .. 127."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) * (2 / 255)
    return (x / scale).round().clamp(-128, 127) * scale


def show(rows: list[dict[str, Any]]) -> None:
    """The table, by bits asked for and KL."""
    table = Table()
    for column in (
        "package",
        "method",
        "bits",
        "perplexity",
        "KL mean",
        "top-1",
        "cpu s",
        "of it loading",
        "wall s",
        "peak MiB",
    ):
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
            f"{row['cpu_seconds']:.2f}",
            f"{loading:.2f}" if (loading := row.get("loading_cpu_seconds")) else "",
            f"{row['seconds']:.2f}",
            f"{row['peak_rss_bytes'] / 2**20:.0f}",
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, required=True, help="a folder with a folder a package")
    parser.add_argument("--packages", nargs="+", default=list(dict.fromkeys(row[0] for row in ROWS)))
    parser.add_argument("--methods", nargs="+", help="as the table calls them; all by default")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2, 8])
    parser.add_argument("--text", type=Path, help="evaluation text; bundled held-out text by default")
    parser.add_argument("--calibration", type=Path, help="calibration text; bundled by default")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--iters", type=int, default=200, help="steps of tunings")
    parser.add_argument("--device", default="cpu", help=f"of {' and '.join(TUNERS)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    for name in ("model", "peers", "text", "calibration"):  # sides run elsewhere
        if getattr(arguments, name) is not None:
            setattr(arguments, name, getattr(arguments, name).resolve())
    show(run(arguments))


if __name__ == "__main__":
    main()
