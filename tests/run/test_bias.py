# SPDX-License-Identifier: Apache-2.0
"""Biases of a language model's layers corrected: no mean error is left where a layer stands in the quantized model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import calibrate
from fewbit.errors import UnsupportedError
from fewbit.model.checkpoint import open_checkpoint

FEW: dict[str, Any] = {"samples": 6, "context": 32, "calibration_dtype": "float32", "method": "gptq", "head": "float"}


@torch.no_grad()
def inputs(model: nn.Module, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the layers ``names`` see of all windows, (tokens, columns)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
        for name in names
    ]
    for window in ids.split(1):
        model(input_ids=window, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).flatten(0, -2) for name, parts in found.items()}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@torch.no_grad()
def test_no_mean_error_is_left(tiny_family: Callable[[str], Path], tmp_path: Path, method: str) -> None:
    source = tiny_family("gpt2")
    floating = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = calibrate.calibration(open_checkpoint(source).tokenizer(), None, 6, 32, 0).ids
    off: dict[bool, dict[str, float]] = {}
    for corrected in (False, True):
        out, few = tmp_path / str(corrected), {**FEW, "method": method}
        made = fewbit.quantize(source, "int4/channel", out=out, correct_bias=corrected, **few)
        layers = [record for record in made.manifest["layers"] if record["block"] is not None]
        assert len(layers) == 8 and {record.get("bias") for record in layers} == {"corrected" if corrected else None}
        model, off[corrected] = fewbit.load(out), {}
        for name, x in inputs(model, ids, [record["name"] for record in layers]).items():
            mean = model.get_submodule(name)(x).double().mean(0) - floating.get_submodule(name)(x).double().mean(0)
            off[corrected][name] = float(mean.abs().max())
    for name, left in off[True].items():
        assert left < 2e-6 < 20 * left + 1e-5 < off[False][name], (name, left, off[False][name])


def test_it_is_refused_where_no_layer_has_a_bias(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no layer that is quantized has a bias"):
        fewbit.quantize(tiny, "int4/channel", out=tmp_path / "out", correct_bias=True, **FEW)


def test_it_is_refused_before_the_whole_model_learns(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="distill"):
        fewbit.quantize(
            tiny_family("gpt2"), "int4/g32/asym", out=tmp_path / "out", correct_bias=True, tune=["distill"], **FEW
        )
