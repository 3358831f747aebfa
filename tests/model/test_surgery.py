# SPDX-License-Identifier: Apache-2.0
"""Law 6 for rotations of whole models: nothing quantized, the logits of the rotated model are those of the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, LLAMA, ids, make
from torch import Tensor
from transformers import AutoModelForCausalLM

from fewbit.errors import InputError, UnsupportedError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.surgery import STREAM, Preparation
from fewbit.model.stream import StreamedModel

ROTATED = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "gemma",
    "mixtral",
    "qwen2-moe",
    "phi3",
    "gpt2",
    "starcoder2",
    "opt",
)
CHANGES = {"opt": {"word_embed_proj_dim": 32}}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """``made(family)``: the folder of a tiny model of it."""
    monkeypatch.setitem(FAMILIES, "gemma", ("gemma", LLAMA))

    def folder(family: str) -> Path:
        make(family, tmp_path / family, **CHANGES.get(family, {}))
        return tmp_path / family

    return folder


def logits(folder: Path, preparation: Preparation | None, dtype: torch.dtype) -> Tensor:
    model = StreamedModel.open(open_checkpoint(folder), preparation)
    model.load("", dtype)
    return model.module.to(dtype)(input_ids=ids(), use_cache=False).logits


@pytest.mark.parametrize("family", ROTATED)
@torch.no_grad()
def test_law_6_logits_do_not_move(family: str, made: Callable[[str], Path]) -> None:
    folder = made(family)
    preparation = Preparation("quarot", {}, seed=3)
    for dtype, within in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        original, rotated = (logits(folder, which, dtype) for which in (None, preparation))
        print(family, dtype, float((rotated - original).abs().max()), float(original.abs().max()))
        assert 0 < (rotated - original).abs().max() <= within * original.abs().max()
