# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments only. What a command does is in :mod:`fewbit.commands`, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewbit.commands import before
from fewbit.commands.arguments import (
    Activation,
    Calibration,
    Debug,
    Device,
    Facts,
    Folder,
    Force,
    Format,
    Head,
    Image,
    Json,
    Method,
    Model,
    Options,
    Recipe,
    Report,
    Rounded,
    Samples,
    Seed,
    Threads,
    Transform,
    Tuning,
    Window,
)
from fewbit.commands.guard import guarded

app = typer.Typer(
    name="fewbit",
    help="A trained language model in few bits: quantize it, measure what that cost, run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"fewbit {installed('fewbit')}")
        raise typer.Exit()


@app.command()
@guarded
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    format: Format = None,
    method: Method = "rtn",
    recipe: Recipe = None,
    option: Options = None,
    transform: Transform = None,
    tune: Tuning = None,
    activation: Rounded = None,
    calibration: Calibration = None,
    facts: Facts = None,
    head: Head = "int8/g64",
    samples: Samples = 128,
    context: Window = 512,
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
    correct_bias: Annotated[bool, typer.Option("--correct-bias", help="Take mean errors from biases.")] = False,
    force: Force = False,
    json: Json = None,
    report: Report = None,
    debug: Debug = False,
) -> None:
    """Quantize MODEL into OUT, verify it, and report. Killed or interrupted, the same command continues."""
    from fewbit.commands import quantize as command

    what = (model, format, method, recipe, option, transform, tune)
    data = (calibration, head, samples, context, seed)
    request = command.Request(*what, *data, threads, force, device, facts, correct_bias, activation)
    command.run(request, out, json, report)


@app.command()
@guarded
def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FACTS", help="Folder to write.")],
    calibration: Calibration = None,
    gram: Annotated[bool, typer.Option(help="Second moments of inputs: gptq, awq, vptq and billm need them.")] = True,
    fisher: Annotated[
        bool, typer.Option(help="Fisher diagonal of weights: skm, squeezellm and nanoquant need it.")
    ] = True,
    ranges: Annotated[bool, typer.Option(help="Histograms of inputs: what static grids need.")] = True,
    merge: Annotated[
        list[Path] | None, typer.Option("--merge", metavar="FACTS", help="Add up such folders instead; repeat it.")
    ] = None,
    samples: Samples = 128,
    context: Window = 512,
    seed: Seed = 0,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FACTS.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Collect what MODEL shows on a text into FACTS, once for many `fewbit quantize --facts FACTS`."""
    from fewbit.commands import calibrate as command

    text = {"calibration": calibration, "samples": samples, "context": context, "seed": seed}
    what = {"gram": gram, "fisher": fisher, "ranges": ranges}
    command.run(model, out, merge or [], json, **text, **what, threads=threads, force=force)


app.command()(before.tell)
app.command()(before.restore)


@app.command()
@guarded
def plan(
    model: Model,
    format: Format = None,
    method: Method = "rtn",
    recipe: Recipe = None,
    option: Options = None,
    transform: Transform = None,
    tune: Tuning = None,
    activation: Rounded = None,
    calibration: Calibration = None,
    facts: Facts = None,
    head: Head = "int8/g64",
    samples: Samples = 128,
    context: Window = 512,
    seed: Seed = 0,
    threads: Threads = None,
    force: Force = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """What quantizing MODEL would give and take: size and true bits (exact), memory and time (estimated), kernels."""
    from fewbit.commands import plan as command
    from fewbit.commands.quantize import Request

    what = (model, format, method, recipe, option, transform, tune)
    data = (calibration, head, samples, context, seed)
    request = Request(*what, *data, threads, force, facts=facts, activation=activation)
    command.run(request, json)


@app.command()
@guarded
def allocate(
    model: Model,
    budget: Annotated[float, typer.Option("--budget", help="True bits a weight of the blocks' layers, all included.")],
    facts: Annotated[Path, typer.Option("--facts", help="A folder of `fewbit calibrate`.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="RECIPE", help="TOML file to write.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option("--candidate", metavar="FORMAT[:METHOD]", help="Repeat it; default: int2 to int8/g64/asym."),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="Of candidates that name none.")] = "gptq",
    by: Annotated[str, typer.Option("--by", help="Harm: output or fisher, or kl, which is measured.")] = "output",
    unit: Annotated[str, typer.Option("--unit", help="What shares a format: layer or block.")] = "layer",
    estimate: Annotated[str | None, typer.Option("--estimate", help="A cheaper method to find errors with.")] = None,
    head: Head = "int8/g64",
    calibration: Calibration = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows that kl is measured on.")] = 8,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in such a window.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Which windows; other ones than those of the facts.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of kl; later ones start from what was chosen.")] = 2,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace RECIPE; accept data-free below 3 bits.")] = False,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """Write a recipe that spends a budget of true bits where MODEL minds most: `fewbit quantize --recipe RECIPE`."""
    from fewbit.commands import allocate as command

    text = {"calibration": calibration, "samples": samples, "context": context, "seed": seed, "rounds": rounds}
    what = {"facts": facts, "method": method, "by": by, "unit": unit, "estimate": estimate, "head": head}
    command.run(model, budget, candidate, out, json, **what, **text, threads=threads, force=force)


@app.command()
@guarded
def eval(
    out: Folder,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The original; default: the one in the manifest.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Held-out text; default: the bundled text.")] = None,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens in a window.")] = 2048,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=2, help="Tokens of the text to read; default: all.")
    ] = None,
    decode_tokens: Annotated[
        int, typer.Option("--decode-tokens", min=0, help="Tokens whose generation is timed; 0 leaves speed out.")
    ] = 64,
    threads: Threads = None,
    activation: Activation = None,
    engine: Annotated[Literal["native", "transformers"], typer.Option("--engine", help="Of OUT's logits.")] = "native",
    json: Json = None,
    report: Report = None,
    debug: Debug = False,
) -> None:
    """Measure OUT against the original; write evaluation.json, README.md and report.html into OUT."""
    from fewbit.commands import evaluate as command

    command.run(out, reference, text, context, max_tokens, decode_tokens, threads, activation, engine, json, report)


@app.command()
@guarded
def bench(
    out: Folder,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch sizes of the kernel rows; default 1 and 128.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to decode.")] = 64,
    prompt: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens to prefill.")] = 256,
    threads: Threads = None,
    activation: Activation = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """How fast OUT runs here: prefill, decode, and each kernel against torch fp32 and bf16 in the same minutes."""
    from fewbit.commands import bench as command

    command.run(out, tuple(batch or (1, 128)), tokens, prompt, threads, activation, json)


@app.command()
@guarded
def generate(
    out: Folder,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue, or the message to answer.")],
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, by the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Only the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Only the likeliest, up to this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Only those this many times as likely as the likeliest.")] = 0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="1: none.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends it; may be repeated.")] = None,
    seed: Seed = 0,
    kv: Annotated[str, typer.Option("--kv", help="Keys and values: float16, bfloat16, float32, int8, int4.")] = (
        "float16"
    ),
    threads: Threads = None,
    image: Image = True,
    activation: Activation = None,
    debug: Debug = False,
) -> None:
    """Continue a text with OUT, or answer a message, printed as it comes."""
    from fewbit.commands import generate as command

    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
        "seed": seed,
    }
    command.run(command.Request(out, prompt, chat, sampling, activation, kv, threads, image))


@app.command()
@guarded
def serve(
    out: Folder,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; other than loopback is reachable.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="FEWBIT_TOKEN", help="What clients must show; default: a new random one."),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Let everyone in who reaches the address.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="The model's name; default: the folder's.")] = None,
    sequences: Annotated[int, typer.Option("--sequences", min=1, max=64, help="Texts written at once.")] = 8,
    kept: Annotated[int, typer.Option("--kept", min=0, help="Caches of finished texts kept beside, for reuse.")] = 4,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Texts that may wait.")] = 256,
    context: Annotated[int | None, typer.Option("--context", min=2, help="Positions of a text; default: all.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most; default: the context.")
    ] = None,
    kv: Annotated[str, typer.Option("--kv", help="Keys and values: float16, bfloat16, float32, int8, int4.")] = (
        "float16"
    ),
    origins: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="Let pages of ORIGIN ask, e.g. http://localhost:3000."),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Serve /v1/embeddings too: loads the model in transformers as well.")
    ] = False,
    threads: Threads = None,
    image: Image = True,
    activation: Activation = None,
    debug: Debug = False,
) -> None:
    """Serve OUT to clients of the OpenAI protocol, and a page to chat with it. Needs the extra `serve`."""
    from fewbit.commands import serve as command

    what = (out, host, port, token, no_token, name, sequences, kept, queue, context, max_tokens)
    command.start(command.Request(*what, kv, activation, embeddings, threads, image, origins or []), debug)


@app.command()
@guarded
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder, a .gguf or a .safetensors file.")],
    json: Json = None,
    debug: Debug = False,
) -> None:
    """What a model holds: tensors, formats, true bits, skipped layers and why; hashes verified when listed."""
    from fewbit.commands import inspect as command

    command.run(path, json)


@app.command()
@guarded
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Folders that fewbit wrote.")],
    json: Json = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML page too.")] = None,
    debug: Debug = False,
) -> None:
    """Several results side by side: size, bits, perplexity, KL, agreement, speed."""
    from fewbit.commands import compare as command

    command.run(folders, json, report)


@app.command()
@guarded
def doctor(json: Json = None, debug: Debug = False) -> None:
    """What is here: versions, instruction sets, kernels, GPU, extras, export targets."""
    from fewbit.commands import doctor as command

    command.run(json)


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("fewbit-demo"),
    format: Annotated[str, typer.Option("--format", "-f", help="Number format.")] = "int4/g64/asym",
    method: Method = "gptq",
    samples: Samples = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=256, help="Held-out tokens to measure on.")] = 8192,
    threads: Threads = None,
    json: Json = None,
    debug: Debug = False,
) -> None:
    """The whole job on a real model: quantize SmolLM2-135M from its wheel, measure it, report, say something."""
    from fewbit.commands import demo as command

    command.run(out, format, method, samples, max_tokens, threads, json)


def main() -> None:
    """Read the command line and do what it says."""
    app(prog_name="fewbit")
