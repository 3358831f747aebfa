# SPDX-License-Identifier: Apache-2.0
"""What does each method cost in accuracy, at which true bits? One command, one table.

    python bench/accuracy.py MODEL --text wikitext2_test.txt --windows 40 --unscored 256 --json results.json

Quantizes MODEL with every format (or scheme: W8A8, W8A8_STATIC) and method asked for, and by every recipe, decodes
the written folder, and scores it, inputs rounded where the scheme says so, against the float model on the same windows:
perplexity, KL to the float model, top-1 agreement, all with standard errors clustered by window. Scoring runs on a GPU
where there is one; quantizing is the pipeline's own.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fewbit
from fewbit import calibrate, methods
from fewbit.containers import manifest as M
from fewbit.containers.files import read_json, write_json
from fewbit.measure.accuracy import Scores, score, summarize
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe
from fewbit.run.decoding import decode_into
from fewbit.run.events import Event
from fewbit.run.rewriting import as_run

METHODS: dict[str, tuple[tuple[str | dict[str, Any], ...], str, dict[str, Any]]] = {
    "rtn": ((), "rtn", {}),
    "clip": ((), "clip", {}),
    "laq percentile": ((), "laq", {"statistic": "percentile"}),
    **{f"laq {bits}": ((), "laq", {"mean_bits": bits}) for bits in (2.5, 2.56, 3.5, 3.56, 4.5, 4.56)},
    "imatrix": ((), "imatrix", {}),
    "gptq": ((), "gptq", {"desc_act": False}),
    "gptq act-order": ((), "gptq", {"desc_act": True}),
    "gptq act-order, plain ranges": ((), "gptq", {"desc_act": True, "clip": False}),
    "hqq": ((), "hqq", {}),
    "awq scale": (("awq",), "rtn", {}),
    "awq clip": ((), "awq", {}),
    "awq": (("awq",), "awq", {}),
    "awq each layer": (({"name": "awq", "samples": 0},), "awq", {}),
    "awq scale, each layer": (({"name": "awq", "samples": 0},), "rtn", {}),
    "awq + clip": (("awq",), "clip", {}),
    "awq + gptq": (("awq",), "gptq", {}),
    "skm": ((), "skm", {}),
    "squeezellm 0.45 %": ((), "squeezellm", {}),
    "vptq": ((), "vptq", {}),
    **{f"vptq {share} %": ((), "vptq", {"outliers": share / 100}) for share in (2, 5, 10)},
    **{f"vptq {norm}": ((), "vptq", {"norm": norm}) for norm in ("rows", "columns", "both")},
    "vptq rows 5 %": ((), "vptq", {"norm": "rows", "outliers": 0.05}),
    "vptq 5 % residual": ((), "vptq", {"outliers": 0.05, "outlier_bits": 5, "outlier_residual_bits": 5}),
    "vptq greedy": ((), "vptq", {"rounds": 0, "beam": 1, "restarts": 1}),
    "hadamard + vptq": (("hadamard",), "vptq", {}),
    **{f"smooth {alpha}": (({"name": "smooth", "alpha": alpha},), "rtn", {}) for alpha in (0.3, 0.5, 0.7, 0.85)},
    "ptq161": ((), "ptq161", {}),
    "billm": ((), "billm", {}),
    "arb": ((), "arb", {}),
    **{f"nanoquant {bits}": ((), "nanoquant", {"bits": bits}) for bits in (0.55, 1.0, 1.5, 2.0, 2.3)},
    "autoround": ((), "autoround", {}),
    "awq + autoround": (("awq",), "autoround", {}),
}
"""Transforms, method and options by the name of a row. ``NAME > rounding > scales`` tunes blocks after a row, and
a last ``> distill`` the whole model."""
RECIPE = "recipe"
"""In place of a method: the format is the name of a recipe's file."""
USUAL = ("rtn", "clip", "gptq", "gptq act-order")


def choice(text: str) -> str:
    """``text``, if it names a row, and tunings after it."""
    name, *tune = text.split(" > ")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r}: rows are {', '.join(METHODS)}")
    Recipe.simple("int4", tune=tune)
    return text


def settings(text: str, steps: dict[str, float], whole: dict[str, float]) -> dict[str, Any]:
    """Keywords of :func:`fewbit.quantize` for the row ``text``, its tunings with the options ``steps``, what the whole
    model learns with ``whole``."""
    name, *tune = text.split(" > ")
    transforms, method, options = METHODS[name]
    if methods.named(method).tuning:
        options = {**options, **steps}
    ends = {row.name for row in methods.MODEL_TUNINGS}
    tunes = [{"name": one, **(whole if one in ends else steps)} for one in tune]
    return {"method": method, "options": options, "transforms": transforms, "tune": tunes}


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) float32 logits of one window."""
    return module(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def aloud(event: Event) -> None:
    """Say what happens, and when."""
    if event.message or event.kind == "block":
        print(f"{time.strftime('%H:%M:%S')} {event.message or f'{event.block} of {event.blocks}'}", flush=True)


def quantized(arguments: argparse.Namespace, format: str, name: str, out: Path) -> float:
    """Quantize into ``out``; seconds."""
    began = time.monotonic()
    steps = {key: getattr(arguments, key) for key in ("iters", "lr", "relative", "cosine", "own")}
    whole = {key: getattr(arguments, f"whole_{key}") for key in ("iters", "batch", "lr", "vectors", "label")}
    given = {} if name == RECIPE else settings(name, steps, whole)

    def to(out: Path, model: Any, **more: Any) -> None:
        fewbit.quantize(
            model,
            Recipe.read(format) if name == RECIPE else format,
            **given,
            out=out,
            calibration=arguments.calibration,
            facts=arguments.facts,
            samples=arguments.samples,
            context=arguments.context,
            head=arguments.head,
            device=arguments.device,
            force=True,
            progress=aloud,
            **more,
        )

    model, more = arguments.model, {}
    if arguments.restore:
        to(out.parent / "first", model)
        shared = {"text": arguments.calibration, "samples": arguments.samples, "context": arguments.context}
        words = open_checkpoint(model).tokenizer()
        model, more = (
            fewbit.restore(model, out.parent / "first", steps=arguments.restore, lr=1e-3, **shared),
            {"tokenizer": words},
        )
    to(out, model, **more)
    return time.monotonic() - began


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a format and method."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = open_checkpoint(arguments.model)
    text = calibrate.heldout_text() if arguments.text is None else calibrate.read_text(arguments.text)
    windows = calibrate.windows(checkpoint.tokenizer(), text, arguments.context, "text")[: arguments.windows].to(device)
    reference, ours = (StreamedModel.open(checkpoint) for _ in range(2))
    for streamed in (reference, ours):
        streamed.load("")
        streamed.module.to(device)  # type: ignore[arg-type]
    rows = []
    work = [(format, name) for format in arguments.formats for name in arguments.methods]
    for format, name in [*work, *((str(path), RECIPE) for path in arguments.recipes)]:
        with TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # whose peak memory is its own
                seconds = apart.submit(quantized, arguments, format, name, out).result()
            manifest, peak = M.read(out), read_json(Path(f"{out}.log.json"))["peak_rss_bytes"]
            ours.load("")
            ours.module.to(device)  # type: ignore[arg-type]
            rounding = decode_into(ours, out, manifest["layers"])
        with as_run(ours, rounding):
            scored: list[Scores] = [
                score(logits(ours.module, ids), ids, logits(reference.module, ids), arguments.unscored)
                for ids in windows
            ]
        linear = [layer for layer in manifest["layers"] if layer["kind"] not in ("embedding", "head")]
        weights = sum(layer["shape"][0] * layer["shape"][1] * layer["experts"] for layer in linear)
        bits = 8 * sum(layer["nbytes"] for layer in linear) / weights
        row = {"format": format, "method": name, "bits": bits, "seconds": seconds, **summarize(scored)}
        row["peak_rss_bytes"] = peak
        row["reference_perplexity"] = row["perplexity"] / row["perplexity_ratio"]
        rows.append(row)
        print(json.dumps({key: row[key] for key in ("format", "method", "bits", "perplexity", "kl_mean")}), flush=True)
        if arguments.json:
            write_json(arguments.json, {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table, grouped by format."""
    table = Table(title=f"float32 perplexity {rows[0]['reference_perplexity']:.3f}")
    for column in ("format", "method", "true bits", "perplexity", "KL mean", "KL 99.9 %", "top-1", "seconds", "MiB"):
        table.add_column(column, justify="left" if column in ("format", "method") else "right")
    for row in rows:
        table.add_row(
            row["format"],
            row["method"],
            f"{row['bits']:.3f}",
            f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}",
            f"{row['kl_mean']:.4f} ± {row['kl_mean_stderr']:.4f}",
            f"{row['kl_p999']:.2f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['seconds']:.0f}",
            f"{row['peak_rss_bytes'] / 2**20:.0f}",
        )
    Console(width=120).print(table)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that :func:`run` reads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="evaluation text; bundled held-out text by default")
    parser.add_argument("--calibration", type=Path, help="calibration text; bundled by default")
    parser.add_argument("--facts", type=Path, help="a folder of `fewbit calibrate`, instead of calibrating")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--unscored", type=int, default=1, help="leading tokens of a window that only give context")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--head", default="int8/g64")
    sizes = [f"int{bits}/g{group}/asym" for group in (128, 64) for bits in (8, 4, 3, 2)]
    parser.add_argument("--formats", nargs="*", default=sizes)
    parser.add_argument("--methods", nargs="+", default=list(USUAL), type=choice, help="rows")
    parser.add_argument("--recipes", nargs="+", default=[], type=Path, help="files; they name methods of their own")
    parser.add_argument("--relative", type=float, default=1.0, help="option of tunings; 0 is plain mean square")
    parser.add_argument("--cosine", type=float, default=0.0, help="option of tunings; -log cos added to the loss")
    parser.add_argument("--own", type=float, default=0.0, help="option of tunings; the loss on a block's own inputs")
    parser.add_argument("--lr", type=float, default=0.0, help="option of tunings; 0 is each one's own")
    parser.add_argument("--restore", type=int, default=0, help="steps of restorative preprocessing, at a rate of 1e-3")
    parser.add_argument("--device", default="cpu", help="where blocks are tuned: cpu or cuda")
    parser.add_argument("--iters", type=int, default=200, help="steps of tunings")
    for option, default in methods.MODEL_TUNINGS[0].options.items():
        told = f"option {option} of what the whole model learns"
        parser.add_argument(f"--whole-{option}", type=type(default), default=default, help=told)
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    show(run(parser(__doc__.splitlines()[0]).parse_args()))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
