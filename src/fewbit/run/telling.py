# SPDX-License-Identifier: Apache-2.0
"""Text that a model tells by itself, to calibrate it on.

As LLM-QAT does where the data that a model was trained on is not at hand (Liu et al. 2023, arXiv:2305.17888): token
after token is drawn from what the model foretells, at temperature 1 and from all of the vocabulary, so that the text
covers what the model knows as often as the model expects it. (The paper takes the most likely token for the first few;
here all are drawn.) A text that ends makes room for a new one in the same window.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.containers.files import write_bytes
from fewbit.errors import InputError, SpecError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.run.events import Event, Progress
from fewbit.run.opening import longest, silent
from fewbit.run.workers import workers


def tell(
    model: str | Path,
    out: str | Path,
    *,
    samples: int = 128,
    context: int = 512,
    seed: int = 0,
    opening: str | None = None,
    temperature: float = 1.0,
    batch: int = 64,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write ``samples`` texts of ``context`` tokens that ``model`` tells into ``out``, JSON lines with a ``text`` each,
    which ``calibration=`` takes. The whole model is in memory, in float32.

    Args:
        model: the float model: a folder, a GGUF file, or a hub id.
        opening: what each text begins with, such as ``"<|endoftext|>"``; the tokenizer's token for a beginning, else
            that for an end, where it is None.
        temperature: less than 1 keeps to what is likely.
        batch: texts at once. Each batch has a seed of its own: on a CPU any number of ``threads`` tells the same.
        device: where it runs. What a GPU tells is not what a CPU does.

    Raises:
        InputError: ``out`` exists and ``force`` is off, or the tokenizer has no such token. SpecError: a number is out
        of range.
    """
    target, checkpoint = Path(out), open_checkpoint(model)
    if target.exists() and not force:
        works = "give another -o, remove it, or --force to replace it"
        raise InputError(f"writing {target}", "it exists already", works)
    if min(samples, batch) < 1 or not temperature > 0 or not 2 <= context <= longest(checkpoint):
        works = f"at least 1, and a context of 2 to {longest(checkpoint)} tokens"
        raise SpecError(
            "telling texts", f"samples={samples}, context={context}, batch={batch}, temperature={temperature}", works
        )
    words, say = checkpoint.tokenizer(), progress or silent
    first = _first(words, opening)
    streamed = StreamedModel.open(checkpoint)
    streamed.load("")
    streamed.module.to(device)
    texts: list[str] = []

    def one(start: int) -> Tensor:
        generator = torch.Generator(device).manual_seed((seed << 32) + start)
        ids = torch.tensor(first, device=device).expand(min(batch, samples - start), -1)
        return draw(streamed.module, ids, context, temperature, generator, words.eos_token_id)

    with workers(threads) as pool:
        for ids in (pool.map if device == "cpu" else map)(one, range(0, samples, batch)):
            texts += words.batch_decode(ids, skip_special_tokens=True)
            say(Event("note", message=f"{len(texts)} of {samples} texts told"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_bytes(target, lines.encode())
    return target


def _first(words: Callable[..., Any], opening: str | None) -> list[int]:
    """Tokens that every text begins with."""
    if opening is not None:
        ids: list[int] = words(opening, add_special_tokens=False)["input_ids"]
        if ids:
            return ids
    found = getattr(words, "bos_token_id", None), getattr(words, "eos_token_id", None)
    known = [token for token in found if token is not None]
    if not known or opening is not None:
        raise InputError("the beginning of a text", "there is no token for it", "give an opening, such as a letter")
    return known[:1]


def draw(
    module: nn.Module, first: Tensor, tokens: int, temperature: float, generator: torch.Generator, end: int | None
) -> Tensor:
    """``first`` (texts, n) continued to (texts, ``tokens``) ids, each drawn as ``module`` foretells it; after ``end``
    comes ``first`` again, where that is something else."""
    ids = torch.zeros(len(first), tokens, dtype=torch.long, device=first.device)
    ids[:, : first.shape[1]] = first
    again = first[:, :1] if first.shape[1] == 1 else None
    inputs, past = first, None
    for place in range(first.shape[1], tokens):
        answer = module(input_ids=inputs, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        chances = (answer.logits[:, -1].float() / temperature).softmax(-1)
        inputs = torch.multinomial(chances, 1, generator=generator)
        if again is not None and end is not None:
            inputs = torch.where(ids[:, place - 1 : place] == end, again, inputs)
        ids[:, place] = inputs[:, 0]
    return ids
