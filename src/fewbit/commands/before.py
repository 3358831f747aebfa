# SPDX-License-Identifier: Apache-2.0
"""Arguments of the commands for what may come before quantizing: text of the model's own, a model made easier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.commands.arguments import Calibration, Debug, Model, Samples, Seed, Threads, Window
from fewbit.commands.guard import guarded


@guarded
def tell(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="JSON lines to write.")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Texts.")] = 128,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a text.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="Below 1 keeps to what is likely.")] = 1.0,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="TEXT", help="A text or JSONL file that texts go on from.")
    ] = None,
    beginning: Annotated[int, typer.Option("--beginning", min=1, help="Tokens of it that a text begins with.")] = 32,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Texts at once; another number, other texts.")] = 64,
    threads: Threads = None,
    device: Annotated[str, typer.Option("--device", help="Where the model runs: cpu or cuda.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    debug: Debug = False,
) -> None:
    """Let MODEL tell texts to calibrate it on, where what it was trained on is not at hand."""
    from fewbit.commands import tell as command

    what = {"samples": samples, "context": context, "temperature": temperature, "seed": seed, "batch": batch}
    begun = {"prompts": prompts, "beginning": beginning}
    command.run(model, out, **what, **begun, threads=threads, device=device, force=force)


@guarded
def restore(
    model: Model,
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED", help="What quantizing MODEL wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the float model.")],
    calibration: Calibration = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the products that are learned beside layers.")] = 64,
    steps: Annotated[int, typer.Option("--steps", help="Of AdamW; the paper takes 20000.")] = 200,
    batch: Annotated[int, typer.Option("--batch", help="Windows of a step.")] = 4,
    lr: Annotated[float, typer.Option("--lr", help="Rate of the first step.")] = 1e-4,
    samples: Samples = 128,
    context: Window = 256,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace FOLDER.")] = False,
    debug: Debug = False,
) -> None:
    """Make up in MODEL's weights for what quantizing it to QUANTIZED broke (PTQ1.61's preprocessing): quantize FOLDER
    in its place."""
    from fewbit.commands import restore as command

    learned = {"rank": rank, "steps": steps, "batch": batch, "lr": lr}
    text = {"text": calibration, "samples": samples, "context": context, "seed": seed}
    command.run(model, quantized, out, **learned, **text, force=force)
