# SPDX-License-Identifier: Apache-2.0
"""Continuing one text: where it ends, and what is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbit.decode import Engine, open_engine
from fewbit.decode.loop import continuation, drawn, end_tokens, likeliest
from fewbit.errors import InputError


@pytest.fixture
def engine(tiny_family: Callable[[str], Path]) -> Engine:
    return open_engine(tiny_family("llama"), sequences=1)


def test_greedy_tokens_are_the_likeliest_of_the_whole_text(engine: Engine) -> None:
    text = [5, 9, 3]
    text += continuation(engine, text, 12)
    assert len(text) == 15
    for place in range(3, 15):
        sequence = engine.open()
        assert likeliest(engine.feed([(sequence, text[:place])])[0]) == text[place]
        engine.close(sequence)


def test_it_ends_at_an_end_token_and_at_the_context(engine: Engine) -> None:
    free = list(continuation(engine, [5, 9, 3], 12))
    end = free[4]
    assert list(continuation(engine, [5, 9, 3], 12, ends={end})) == free[: free.index(end) + 1]
    assert len(list(continuation(engine, [7] * 60, 99))) == engine.context - 60
    with pytest.raises(InputError, match="64 tokens"):
        next(continuation(engine, [7] * 64, 1))
    with pytest.raises(InputError, match="no tokens"):
        next(continuation(engine, [], 1))
    assert engine.nbytes() == 0


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    choose = drawn(0.5, 7)
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[choose(logits)] += 1
    expected = torch.softmax(2 * logits, 0)
    assert ((counts / 4000 - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()
    again = [drawn(0.5, 7)(logits) for _ in range(5)]
    assert len(set(again)) == 1


def test_end_tokens(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert end_tokens(tmp_path) == {3}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert end_tokens(tmp_path) == {4, 5}
