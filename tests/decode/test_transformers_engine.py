# SPDX-License-Identifier: Apache-2.0
"""The engine over transformers: what it answers is what the model answers to the whole sequence at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbit.decode.transformers_engine import TransformersEngine
from fewbit.errors import InputError, UnsupportedError
from fewbit.model.classes import from_folder

TOKENS = [5, 9, 3, 44, 7, 30, 12, 60, 8, 21, 33]


def engine(folder: Path, **options: int) -> TransformersEngine:
    return TransformersEngine(from_folder(folder), "a test", **options)


def whole(made: TransformersEngine, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return made.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "qwen3-moe"])
def test_feed_keep_and_fork(tiny_family: Callable[[str], Path], family: str) -> None:
    made = engine(tiny_family(family))
    one = made.open()
    torch.testing.assert_close(made.feed([(one, TOKENS[:6])])[0], whole(made, TOKENS[:6]), rtol=1e-4, atol=1e-5)
    other = made.fork(one, 3)
    both = made.feed([(one, TOKENS[6:7]), (other, TOKENS[4:9])])
    torch.testing.assert_close(both[0], whole(made, TOKENS[:7]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1], whole(made, TOKENS[:3] + TOKENS[4:9]), rtol=1e-4, atol=1e-5)
    made.keep(one, 2)
    torch.testing.assert_close(
        made.feed([(one, TOKENS[5:])])[0], whole(made, TOKENS[:2] + TOKENS[5:]), rtol=1e-4, atol=1e-5
    )
    made.keep(one, 0)
    torch.testing.assert_close(made.feed([(one, TOKENS[:1])])[0], whole(made, TOKENS[:1]), rtol=1e-4, atol=1e-5)
    assert made.nbytes() > 0
    made.close(one), made.close(other)
    assert made.nbytes() == 0


def test_refusals(tiny_family: Callable[[str], Path]) -> None:
    made = engine(tiny_family("llama"), sequences=1, context=8)
    one = made.open()
    with pytest.raises(UnsupportedError, match="one more sequence"):
        made.open()
    for parts, what in (
        ([(one, [])], "no tokens"),
        ([(one, [made.vocab_size])], "ids below"),
        ([(one, [-1])], "ids below"),
        ([(one, [1] * 9)], "exceed the context"),
        ([(one, [1]), (one, [2])], "twice"),
        ([(one + 1, [1])], "not open"),
    ):
        with pytest.raises(InputError, match=what):
            made.feed(parts)
    assert made.length(one) == 0
    with pytest.raises(InputError, match="it has 0"):
        made.keep(one, 1)
    with pytest.raises(InputError, match="it has 0"):
        made.fork(one, 1)
    with pytest.raises(InputError, match="not open"):
        made.close(one + 1)
