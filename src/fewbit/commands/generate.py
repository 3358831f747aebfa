# SPDX-License-Identifier: Apache-2.0
"""``fewbit generate``: continue a text, printed as it comes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from fewbit import kernels
from fewbit.commands.console import err
from fewbit.decode import Engine, open_engine
from fewbit.decode.loop import continuation, drawn, end_tokens, likeliest
from fewbit.errors import InputError


def run(
    out: Path,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int | None,
    activation: str | None,
) -> None:
    """Stream the continuation to stdout; tokens a second to stderr."""
    prepare(threads)
    tokenizer = tokenizer_of(out)
    engine = open_engine(out, activation=activation, sequences=1, threads=threads)
    if engine.why is not None:
        err().print(f"transformers computes, more slowly: {engine.why}", markup=False)
    began = time.perf_counter()
    added = stream(engine, out, tokenizer, prompt, max_tokens, temperature, seed)
    seconds = time.perf_counter() - began
    err().print(f"{added} tokens in {seconds:.1f} s, {added / max(seconds, 1e-9):.1f} tokens/s", markup=False)


def stream(
    engine: Engine,
    folder: Path,
    tokenizer: Any,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> int:
    """Print ``prompt`` and its continuation to stdout; returns the number of tokens added. ``folder`` says which tokens
    end a text.

    Raises:
        InputError: the prompt holds no token, or more than the context.
    """
    from transformers import TextStreamer

    tokens = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if not tokens:
        raise InputError("generating", "the prompt holds no token", "give a text with --prompt")
    choose = drawn(temperature, seed) if temperature > 0 else likeliest
    printer = TextStreamer(tokenizer, skip_special_tokens=True)
    printer.put(torch.tensor(tokens))
    added = 0
    for token in continuation(engine, tokens, max_tokens, choose, end_tokens(folder)):
        printer.put(torch.tensor([token]))
        added += 1
    printer.end()
    return added


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer saved in ``folder``.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(
            f"the tokenizer of {folder}", "the folder holds none", "copy the original's tokenizer files there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {folder}", " ".join(str(error).split())[:300]) from error


def prepare(threads: int | None) -> None:
    """``threads`` for torch and for fewbit's kernels (None leaves both as they are); no bars from transformers."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which transformers does
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
        kernels.set_threads(threads)
