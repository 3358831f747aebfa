# SPDX-License-Identifier: Apache-2.0
"""Text that a model tells: its rules, and that it is drawn from what the model foretells."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import calibrate
from fewbit.errors import InputError, SpecError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.run.telling import GREEDY, draw

NOTHING = torch.empty(1, 0, dtype=torch.long)


def test_likely_tokens_after_the_first_and_never_special_ones(tiny: Path) -> None:
    """Against transformers' own model without its cache."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    never = torch.tensor([0, 7])
    with torch.no_grad():
        ids = draw(model, never, NOTHING.expand(6, -1), 12, 1.0, torch.Generator().manual_seed(3))
        scores = model(input_ids=ids).logits.index_fill(-1, never, -torch.inf)
    assert ids.shape == (6, 12) and not torch.isin(ids, never).any()
    likely = scores.argmax(-1)[:, :-1] == ids[:, 1:]
    assert bool(likely[:, :GREEDY].all()) and not bool(likely[:, GREEDY:].all())
    assert len(set(ids[:, 0].tolist())) > 1


class Fixed(nn.Module):
    """Foretells the same after every token."""

    SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(len(self.SCORES), 1)

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        scores = self.SCORES.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=scores, past_key_values=None)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_as_often_as_they_are_foretold(temperature: float) -> None:
    begun, size = NOTHING.expand(4000, -1), GREEDY + 3
    ids = draw(Fixed(), torch.tensor([4]), begun, size, temperature, torch.Generator().manual_seed(0))
    drawn = ids[:, GREEDY + 1 :].flatten()
    for places, expected in (
        (ids[:, 0], torch.full((4,), 0.25)),
        (drawn, (Fixed.SCORES[:4] / temperature).softmax(0)),
    ):
        found = torch.bincount(places, minlength=5)[:4] / len(places)
        deviation = (expected * (1 - expected) / len(places)).sqrt()
        assert bool(((found - expected).abs() < 5 * deviation).all())


def test_texts_go_on_from_prompts(tiny: Path, tmp_path: Path) -> None:
    """Token by token against transformers' own model without its cache, at a temperature that only takes the likeliest;
    five texts from two beginnings."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    begun = torch.tensor([[9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        ids = draw(model, torch.tensor([0]), begun, 10, 1e-6, torch.Generator())
        scores = model(input_ids=ids).logits.index_fill(-1, torch.tensor([0]), -torch.inf)
    assert torch.equal(ids[:, :6], begun) and torch.equal(scores[:, 5:-1].argmax(-1), ids[:, 6:])
    (tmp_path / "prompts.txt").write_text("one two three four five six seven eight")
    path = fewbit.tell(
        tiny, tmp_path / "out.jsonl", samples=5, context=24, prompts=tmp_path / "prompts.txt", beginning=16
    )
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert [text[:16] for text in texts] == ["one two three fo", "ur five six seve"] * 2 + ["one two three fo"]
    assert len(set(texts)) == 5


def test_any_number_of_threads_tells_the_same_and_calibrates(tiny: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"samples": 5, "context": 24, "batch": 2}
    one = fewbit.tell(tiny, tmp_path / "one.jsonl", threads=1, **more)
    three = fewbit.tell(tiny, tmp_path / "three.jsonl", threads=3, **more)
    other = fewbit.tell(tiny, tmp_path / "other.jsonl", seed=1, **more)
    assert one.read_bytes() == three.read_bytes() != other.read_bytes()
    assert len(one.read_text().splitlines()) == 5
    found = calibrate.calibration(open_checkpoint(tiny).tokenizer(), one, 2, 16, 0)
    assert found.ids.shape == (2, 16)


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(InputError, match="exists already"):
        fewbit.tell(tiny, tmp_path / "there.jsonl")
    for wrong in ({"samples": 0}, {"temperature": 0.0}, {"context": 1}, {"context": 1 << 40}):
        with pytest.raises(SpecError):
            fewbit.tell(tiny, tmp_path / "out.jsonl", **wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="less than the context"):
        fewbit.tell(tiny, tmp_path / "out.jsonl", context=24, prompts=tmp_path / "there.jsonl")
