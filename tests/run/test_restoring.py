# SPDX-License-Identifier: Apache-2.0
"""Restorative preprocessing: what is learned beside quantized layers goes to the float weights, nothing else does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.containers.safetensors import open_safetensors
from fewbit.errors import SpecError, UnsupportedError
from fewbit.run.events import Event

Short = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")


STEPS: dict[str, Any] = {"rank": 2, "steps": 20, "batch": 4, "samples": 4, "context": 64, "lr": 0.02, "dropout": 0.0}


def test_weights_move_by_a_low_rank_that_lowers_the_loss_of_the_quantized_model(
    tiny: Path, short: Short, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    out = short(tmp_path / "out", "int1/channel/min", "ptq161", samples=4, context=32, force=True)
    losses: list[float] = []

    def listen(event: Event) -> None:
        if found := re.search(r"step \d+ of 20, loss ([\d.]+)", event.message):
            losses.append(float(found[1]))

    model = fewbit.restore(tiny, out.path, progress=listen, **STEPS)
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.01
    before = open_safetensors(tiny / "model.safetensors")
    layers = {f"{layer['name']}.weight" for layer in out.manifest["layers"] if layer["block"] is not None}
    for name, parameter in model.named_parameters():
        if name not in before.entries:
            continue  # tied
        change = parameter.detach().double() - before.get(name).double()
        if name not in layers:
            assert torch.equal(parameter.detach(), before.get(name).float()), name
            continue
        sizes = torch.linalg.svdvals(change)
        assert float(sizes[1]) > 0.01 * float(sizes[0]) > 1e4 * float(sizes[2]), name
    # dropped inputs and windows are drawn by the seed; the result goes the way of any other model
    again = fewbit.restore(tiny, out.path, **STEPS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    words = AutoTokenizer.from_pretrained(tiny)
    manifest = fewbit.quantize(
        model, "int4/g32/asym", method="rtn", out=tmp_path / "again", tokenizer=words, samples=4, context=32
    ).manifest
    assert manifest["layers"]


def test_what_cannot_be_restored_is_refused(tiny: Path, short: Short, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rank=0"):
        fewbit.restore(tiny, tmp_path, rank=0)
    rounded = short(tmp_path / "out", "W4A8", "rtn", samples=2, context=32)
    with pytest.raises(UnsupportedError, match="are rounded to int8"):
        fewbit.restore(tiny, rounded.path, **STEPS)
