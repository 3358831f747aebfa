# SPDX-License-Identifier: Apache-2.0
"""Text that a model tells by itself, to calibrate it on.

After LLM-QAT (Liu et al. 2023, arXiv:2305.17888), for where the data that a model was trained on is not at hand: the
first token of a text is any of the vocabulary, the next :data:`GREEDY` are those that the model holds most likely, and
all others are drawn from what it foretells. So the text covers what the model knows about as often as the model expects
it. Where there is a little text of the kind that matters, the model can go on from that instead: any amount of it.
Special tokens never come: texts do not end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.calibrate import calibration
from fewbit.containers.files import refuse_existing, write_bytes
from fewbit.core import given
from fewbit.core.transform import generator_of
from fewbit.errors import SpecError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.run.events import Event, Progress
from fewbit.run.opening import longest, silent
from fewbit.run.workers import workers

GREEDY = 4
"""Tokens after the first one that are not drawn: the authors take 3 to 5."""


def tell(
    model: str | Path,
    out: str | Path,
    *,
    samples: int = 128,
    context: int = 512,
    temperature: float = 1.0,
    prompts: str | Path | None = None,
    beginning: int = 32,
    seed: int = 0,
    batch: int = 64,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write ``samples`` texts of ``context`` tokens that ``model`` tells into ``out``, JSON lines with a ``text`` each,
    which ``calibration=`` takes.

    Args:
        model: the float model: a folder, a GGUF file, or a hub id. All of it is in memory, in float32.
        temperature: below 1 keeps to what is likely.
        prompts: a text or JSONL file. Each told text begins with ``beginning`` tokens from somewhere in it; where it
            has fewer such places than there are texts, places are taken again.
        seed, batch: texts at once. Each batch is drawn by a generator of its own, so that on a CPU any number of
            ``threads`` tells the same.
        device: where the model runs; a GPU tells other texts than a CPU does.

    Raises:
        InputError: ``out`` exists and ``force`` is off; ``prompts`` cannot be read or is too short. SpecError: a number
            is out of range.
    """
    target, checkpoint = given.place("out", out), open_checkpoint(model)
    refuse_existing(target, force)
    if min(samples, batch) < 1 or not temperature > 0 or not 2 <= context <= longest(checkpoint):
        found = f"samples={samples}, context={context}, temperature={temperature}, batch={batch}"
        raise SpecError("telling texts", found, f"positive numbers, and a context of 2 to {longest(checkpoint)} tokens")
    if prompts is not None and not 1 <= beginning < context:
        raise SpecError("telling texts", f"beginning={beginning}", f"1 to {context - 1}: less than the context")
    words, say = checkpoint.tokenizer(), progress or silent
    prompted = torch.empty(1, 0, dtype=torch.long)
    if prompts is not None:
        prompted = calibration(words, prompts, samples, beginning, seed).ids
    streamed, texts = StreamedModel.open(checkpoint), list[str]()
    streamed.load("")
    streamed.module.to(device)
    special = torch.tensor(sorted(words.all_special_ids), dtype=torch.long)

    def one(start: int) -> Tensor:
        generator = generator_of(seed, f"text {start}", device)
        begun = prompted[torch.arange(start, min(start + batch, samples)) % len(prompted)].to(device)
        return draw(streamed.module, special, begun, context, temperature, generator)

    with workers(threads) as pool:
        for ids in (pool.map if device == "cpu" else map)(one, range(0, samples, batch)):
            texts += words.batch_decode(ids, skip_special_tokens=True)  # what a window begins with is no text
            told = f"{len(texts)} of {samples} texts told"
            say(Event("note", block=len(texts), blocks=samples, message=told))
    write_bytes(target, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return target


def draw(
    module: Any, never: Tensor, begun: Tensor, tokens: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Ids (texts, tokens): ``begun`` (texts, any number) and what this module goes on with, never any of ``never``."""
    refused, past, ids = never.to(generator.device), None, begun
    for place in range(begun.shape[1], tokens):
        if place:
            seen = 0 if past is None else place - 1
            answer = module(input_ids=ids[:, seen:], past_key_values=past, use_cache=True)
            past, scores = answer.past_key_values, answer.logits[:, -1].float()
        else:
            scores = torch.zeros(len(begun), module.get_input_embeddings().num_embeddings, device=generator.device)
        scores = scores.index_fill(1, refused, -torch.inf)
        if 0 < place <= GREEDY:
            drawn = scores.argmax(-1, keepdim=True)
        else:
            drawn = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], 1)
    return ids
