# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are finite and whose activations are not: the first layer that sees it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit.errors import InputError

FEW: dict[str, Any] = {"samples": 4, "context": 32, "calibration_dtype": "float32"}
FIRST = r"model\.layers\.0\.mlp\.down_proj.* NaN or infinit"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "rounded": ("int4/g32", {"method": "rtn"}),
    "static": ("W8A8_STATIC", {"method": "rtn"}),
    "gptq": ("int4/g32", {"method": "gptq"}),
    "smooth": ("int4/g32", {"method": "rtn", "transforms": ["smooth"]}),
    "tuned": ("int4/g32", {"method": "rtn", "tune": [{"name": "rounding", "iters": 2, "batch": 2}]}),
    "sensitive": ("palette4", {"method": "skm"}),
    "learned": ("W4A8", {"method": "rtn", "transforms": [{"name": "spinquant", "steps": 1, "batch": 2}]}),
}


def scaled(tiny: Path, folder: Path, by: float) -> Path:
    """The tiny model, gate and up of its first block ``by`` times as large."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight *= by
        mlp.up_proj.weight *= by
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_run_names_the_layer_before_it_solves_its_block(name: str, tiny: Path, tmp_path: Path) -> None:
    format, more = RUNS[name]
    with pytest.raises(InputError, match=FIRST):
        fewbit.quantize(scaled(tiny, tmp_path / "model", 1e25), format, out=tmp_path / "out", **FEW, **more)


@pytest.mark.parametrize("fisher", [False, True])
def test_facts_are_not_written(fisher: bool, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=FIRST):
        fewbit.collect(scaled(tiny, tmp_path / "model", 1e25), out=tmp_path / "facts", fisher=fisher, **FEW)
    assert not (tmp_path / "facts").exists()


def test_facts_whose_squares_overflow_are_not_written(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"facts of model\.layers\.0\.mlp\.down_proj; squares"):
        fewbit.collect(scaled(tiny, tmp_path / "model", 3e10), out=tmp_path / "facts", fisher=False, **FEW)


def test_what_a_method_refuses_names_the_layer(tiny: Path, tmp_path: Path) -> None:
    model = scaled(tiny, tmp_path / "model", 3e10)
    with pytest.raises(InputError, match=r"layer model\.layers\.0\.mlp\.down_proj: gptq .* squares"):
        fewbit.quantize(model, "mxfp4", method="gptq", out=tmp_path / "out", **FEW)


def test_numbers_that_are_only_large_are_quantized_and_recorded(tiny: Path, tmp_path: Path) -> None:
    model = scaled(tiny, tmp_path / "model", 3e10)
    result = fewbit.quantize(model, "mxfp4", method="rtn", out=tmp_path / "out", force=True, **FEW)
    assert 0 < result.manifest["drift"][0]["relative_error"] < 1
