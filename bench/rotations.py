# SPDX-License-Identifier: Apache-2.0
"""What do rotations buy, at which bits of weights and activations? One command, one table.

    python bench/rotations.py MODEL --text samples.txt --calibration stories.txt --context 256 --json results.json

Quantizes MODEL with every format, rotation and method asked for, loads the written folder as a user would, inputs
rounded as it says, and scores it beside the float model. "bits" are those of the matrices in the blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import calibrate, run
from fewbit.containers.files import write_json
from fewbit.errors import FewbitError
from fewbit.measure.accuracy import score, summarize
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe

ROTATIONS: dict[str, tuple[str | dict[str, Any], ...]] = {
    "plain": (),
    "rotate": ("rotate",),
    "hadamard": ("hadamard",),
    "quarot": ("quarot",),
    "quarot o": ({"name": "quarot", "output": 1},),
    "spinquant": ("spinquant",),
    "spinquant kl": ({"name": "spinquant", "kl": 1},),
    "spinquant kl o": ({"name": "spinquant", "kl": 1, "output": 1},),
}
"""Transforms by the name of a row."""
LEARNED: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
"""Rotations by format and row: learned once for all methods, which they do not depend on."""


def given(arguments: argparse.Namespace, transform: str | dict[str, Any]) -> str | dict[str, Any]:
    """``transform`` with what the command line says of learning."""
    options = {"name": transform} if isinstance(transform, str) else transform
    learning = {"steps": arguments.steps, "batch": arguments.batch} if options["name"] == "spinquant" else {}
    return {**options, **learning}


def quantized(arguments: argparse.Namespace, format: str, rotation: str, method: str, out: Path) -> fewbit.run.Result:
    learn = run.learned

    def once(*given: Any) -> dict[str, torch.Tensor]:
        if (format, rotation) not in LEARNED:
            LEARNED[format, rotation] = learn(*given)
        return LEARNED[format, rotation]

    run.learned = once
    try:
        return fewbit.quantize(
            arguments.model,
            Recipe.simple(format, method, arguments.head, {}, [given(arguments, one) for one in ROTATIONS[rotation]]),
            out=out,
            calibration=arguments.calibration,
            samples=arguments.samples,
            context=arguments.context,
            seed=arguments.seed,
            force=True,
            progress=lambda event: print(event.message, flush=True) if event.kind == "note" else None,
        )
    finally:
        run.learned = learn


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) of one window."""
    return model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def row(
    arguments: argparse.Namespace, asked: tuple[str, str, str], windows: Tensor, expected: list[Tensor]
) -> dict[str, Any]:
    """Quantize and score once: format, rotation and method ``asked``; ``expected`` are the float model's logits."""
    format, rotation, method = asked
    with TemporaryDirectory() as scratch:
        began = time.monotonic()
        result = quantized(arguments, format, rotation, method, Path(scratch) / "out")
        seconds = time.monotonic() - began
        model = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
        pairs = zip(windows, expected, strict=True)
        scored = [score(logits(model, ids), ids, float_.float(), arguments.unscored) for ids, float_ in pairs]
    inside = [layer for layer in result.manifest["layers"] if layer["kind"] not in ("embedding", "head")]
    weights = sum(layer["shape"][0] * layer["shape"][1] * layer["experts"] for layer in inside)
    return {
        "format": format,
        "rotation": rotation,
        "method": method,
        "bits": 8 * sum(layer["nbytes"] for layer in inside) / weights,
        "size_bytes": result.manifest["size_bytes"],
        "seconds": seconds,
        **summarize(scored),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, help="evaluation text; bundled held-out text by default")
    parser.add_argument("--calibration", type=Path, help="calibration text; bundled by default")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--unscored", type=int, default=1, help="leading tokens of a window that only give context")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--head", default="int8/g64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--formats", nargs="+", default=["W4A4", "W4A8", "W4A16", "W3A16"])
    parser.add_argument("--rotations", nargs="+", default=["plain", "rotate", "quarot", "spinquant"], choices=ROTATIONS)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--steps", type=int, default=100, help="of learning")
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.model)
    text = calibrate.heldout_text() if arguments.text is None else calibrate.read_text(arguments.text)
    windows = calibrate.windows(checkpoint.tokenizer(), text, arguments.context, "text")[: arguments.windows]
    original = StreamedModel.open(checkpoint)
    original.load("")
    expected = [logits(original.module, ids).half() for ids in windows]
    del original
    rows = []
    for format in arguments.formats:
        for rotation in arguments.rotations:
            for method in arguments.methods:
                try:
                    rows.append(row(arguments, (format, rotation, method), windows, expected))
                except FewbitError as error:
                    rows.append({"format": format, "rotation": rotation, "method": method, "refused": str(error)})
                print(json.dumps(rows[-1]), flush=True)
                if arguments.json:
                    given = {key: str(value) for key, value in vars(arguments).items()}
                    write_json(arguments.json, {"arguments": given, "rows": rows})


if __name__ == "__main__":
    main()
