# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a GGUF file, or a hub id (the only thing that is downloaded).")
]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that fewbit wrote.")]
Format = Annotated[
    str | None, typer.Option("--format", "-f", help="int4/g128/asym, nf4/g64, int3/g64, ternary/g128, W4A16, ...")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        help="How codes are chosen. Without data: rtn, hqq; from calibration: clip, laq, imatrix, gptq, awq, "
        "skm, squeezellm, vptq, ptq161, billm, arb, nanoquant, autoround.",
    ),
]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="TOML rules instead of --format: which layer gets what.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the method, e.g. desc_act=no; may be repeated."),
]
Transform = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        metavar="'NAME [NAME=VALUE ...]'",
        help="Done before the method, e.g. 'smooth alpha=0.7'; may be repeated: smooth, rotate, awq, hadamard; "
        "of the whole model: quarot, spinquant.",
    ),
]
Tuning = Annotated[
    list[str] | None,
    typer.Option(
        "--tune",
        metavar="'NAME [NAME=VALUE ...]'",
        help="Learned after the method, e.g. 'scales iters=100 lr=0.01'; may be repeated. By blocks: rounding, "
        "weights, scales, books, vectors, bounds; last, by the whole model: distill, distill-codes, distill-weights.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Where blocks are tuned: cpu or cuda; all else runs on the CPU.")]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", help="A text or JSONL file, as of `fewbit tell`; default: one bundled."),
]
Facts = Annotated[Path | None, typer.Option("--facts", help="A folder of `fewbit calibrate`, instead of calibrating.")]
Head = Annotated[str, typer.Option("--head", help="Format of lm_head and embeddings; `float` keeps them as they are.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration windows.")]
Window = Annotated[int, typer.Option("--context", min=2, help="Tokens in a calibration window.")]
Seed = Annotated[int, typer.Option("--seed", help="Same input and seed: same bytes.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Default: all cores of this process.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace OUT; accept what gates refuse (data-free below 3 bits, a blown-up result)."),
]
Activation = Annotated[
    str | None,
    typer.Option(
        "--activation",
        help="Round inputs of linear layers to this format, e.g. int8/g64, and multiply integers; default: float.",
    ),
]
Rounded = Annotated[
    str | None,
    typer.Option(
        "--activation",
        help="Round inputs of layers to this format where --format names weights alone: int8/channel, int8/g64, or "
        "int8/static/asym/percentile99.9, fixed by calibration; default: float.",
    ),
]
Image = Annotated[bool, typer.Option(help="Keep the model as kernels read it, in OUT/.fewbit, for faster starts.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; `-` is stdout.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Where the HTML report goes; default: OUT/report.html."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
