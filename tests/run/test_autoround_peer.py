# SPDX-License-Identifier: Apache-2.0
"""A block tuned by auto-round, recorded in tests/golden, and by us: same weights, windows and iterations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import fewbit

GOLDEN = Path(__file__).parent.parent / "golden" / "autoround.npz"

pytestmark = pytest.mark.usefixtures("one_thread")


def block(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """What the only block makes of ``ids``, as float64, before the last norm."""
    seen: list[Tensor] = []
    handle = model.model.layers[0].register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0].double()


def test_tuning_loses_no_more_than_auto_rounds(tmp_path: Path, recorded: Callable[..., Any]) -> None:
    """Mean square error at the output of the block on the windows it was tuned on, 60 iterations of 8 windows."""
    shape = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, saved, keys = recorded(GOLDEN, **shape)
    assert not keys.unexpected_keys
    ids, folder = saved["ids"].long(), tmp_path / "model"
    options = {
        "method": "autoround",
        "options": {"iters": 60, "batch": 8, "relative": 0.0},
        "head": "float",
        "force": True,
    }
    data_ = {"calibration": tmp_path / "text.txt", "samples": 12, "context": 64, "calibration_dtype": "float32"}
    fewbit.quantize(folder, "int3/g32/asym", out=tmp_path / "out", **options, **data_)
    ours, wanted = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), block(model, ids)
    lost = [float((block(ours, ids) - wanted).square().mean())]
    for name in (name for name in saved if name.endswith(".codes")):
        name, scale = name.removesuffix(".codes"), saved[name.replace("codes", "scale")].float()
        codes = saved[f"{name}.codes"].reshape(*scale.shape[:2], -1) - saved[f"{name}.zero"].float()
        layer = model.model.layers[0].get_submodule(name)
        layer.weight.data = (scale * codes).reshape(layer.weight.shape)
    lost.append(float((block(model, ids) - wanted).square().mean()))
    print(lost)
    assert lost[0] <= lost[1]
