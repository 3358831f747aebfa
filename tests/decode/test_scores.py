# SPDX-License-Identifier: Apache-2.0
"""Logarithms of probabilities, of prompts and of texts, against a float64 softmax of transformers' logits."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbit.decode import batch
from fewbit.decode.batch import Batcher, Limits
from fewbit.decode.engine import Engine, open_engine
from fewbit.decode.job import Piece
from fewbit.decode.sampling import Logprobs, Sampling
from fewbit.decode.text import Words, words_of
from fewbit.decode.transformers_engine import TransformersEngine
from fewbit.kernels import native
from fewbit.model.classes import from_folder

TOKENS = [int(token) for token in torch.randint(3, 67, (40,), generator=torch.Generator().manual_seed(3))]
WAYS = (
    Sampling(temperature=0, max_tokens=20, logprobs=5, ignore_eos=True),
    Sampling(temperature=2, seed=5, top_k=30, max_tokens=20, logprobs=5, ignore_eos=True),
    Sampling(temperature=0, repetition_penalty=2, frequency_penalty=1, max_tokens=20, logprobs=5, ignore_eos=True),
)


def written(engine: Engine, words: Words, how: Sampling) -> tuple[list[int], list[Logprobs]]:
    """The whole text after :data:`TOKENS`, and what is said of its tokens, of all but the first."""
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    one = Batcher(engine, words, Limits(running=2, kept=1))
    try:
        job = one.submit(TOKENS, how, pieces.put, scored=True)
        one.submit(TOKENS, how, lambda piece: None)
        seen = [pieces.get(timeout=60)]
        while not seen[-1].last:
            seen.append(pieces.get(timeout=60))
    finally:
        one.close()
    assert seen[-1].error is None
    return job.tokens, [*job.scores, *(logs for piece in seen for _, logs in piece.tokens if logs is not None)]


def check(tokens: list[int], found: list[Logprobs], logits: torch.Tensor, near: float) -> None:
    """``logits``: (tokens, vocabulary) after each of them."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    assert len(found) == len(tokens) - 1 == 59
    for place, one in enumerate(found):
        row = logs[place]
        assert one.taken == pytest.approx(float(row[tokens[place + 1]]), abs=near)
        assert [log for _, log in one.top] == pytest.approx(row.topk(5).values.tolist(), abs=near)
        assert [float(row[token]) for token, _ in one.top] == pytest.approx([log for _, log in one.top], abs=near)


@pytest.mark.skipif(not native.available(), reason="no native module here")
@pytest.mark.parametrize("how", WAYS, ids=["greedy", "drawn", "penalized"])
def test_they_are_the_models_own_whatever_is_asked(
    tiny_family: Callable[[str], Path], how: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_family("llama")
    engine = open_engine(folder, kv="float32")
    monkeypatch.setattr(batch, "SCORED", 7 * engine.vocab_size)
    assert engine.name == "native"
    tokens, found = written(engine, words_of(folder), how)
    with torch.inference_mode():
        logits = from_folder(folder)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    check(tokens, found, logits, 5e-5)  # as logits are in test_native_engine.py: 2e-5, twice, of numbers of about 1


@pytest.mark.skipif(not native.available(), reason="no native module here")
@pytest.mark.parametrize("kv", ["int8", "int4", "float16"])
def test_they_are_of_the_logits_that_few_bits_of_keys_give(tiny_family: Callable[[str], Path], kv: str) -> None:
    folder = tiny_family("mistral")  # whose windows slide
    engine = open_engine(folder, kv=kv)
    assert engine.name == "native"
    tokens, found = written(engine, words_of(folder), WAYS[0])
    check(tokens, found, engine.every_logit(tokens), 1e-12)  # type: ignore[attr-defined]


def test_transformers_engine_gives_them_too(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("llama")
    model = from_folder(folder)
    tokens, found = written(TransformersEngine(model, None, sequences=3), words_of(folder), WAYS[0])
    with torch.inference_mode():
        check(tokens, found, model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0], 5e-5)
