# SPDX-License-Identifier: Apache-2.0
"""What a plan warns of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbit
import fewbit.network
from fewbit.decode.weights import rounding
from fewbit.errors import FewbitError
from fewbit.formats import parse
from fewbit.recipe import Recipe, Rule


@pytest.mark.parametrize("activation", ["int8/channel", "int8/g32/asym", "int4/channel", "nf4/g32", "mxfp4"])
def test_inputs_that_the_native_runtime_does_not_round_are_told(tiny: Path, activation: str) -> None:
    planned = fewbit.plan(tiny, Recipe((Rule("*", "int8/channel", activation=activation),)))
    told = [warning for warning in planned.warnings if f"rounded to {activation}" in warning]
    assert bool(told) == (rounding(parse(activation)) is None)


def test_tensors_that_are_left_out_are_told(tiny: Path, tmp_path: Path) -> None:
    """Layers past those of the configuration, say: what comes out is not the whole of what went in."""
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    held = load_file(path)
    save_file(held | {f"model.layers.2.{n}": torch.ones(2) for n in "abcd"}, path, {"format": "pt"})
    (told,) = fewbit.plan(tmp_path / "model", "int4/g32/asym").warnings
    assert told.startswith("4 tensors of the checkpoint have no place in LlamaForCausalLM")
    assert told.endswith("model.layers.2.a, model.layers.2.b, model.layers.2.c, ...")
    assert not fewbit.plan(tiny, "int4/g32/asym").warnings


IN_TURN = {"desc_act": True, "static_groups": False}


@pytest.mark.parametrize(
    ("format", "method", "options", "transforms", "why"),
    [
        ("int4/g32/asym", "gptq", IN_TURN, (), r"columns that lie apart.*or desc_act=False"),
        ("nf4/g32", "gptq", IN_TURN, (), "columns that lie apart"),
        ("int3/g32/asym", "laq", {"statistic": "median"}, (), "no such statistic"),
        ("int3/g32/asym", "laq", {"percentile": 50.0, "statistic": "percentile"}, (), "above 50"),
        ("int3/g32/asym", "laq", {"mean_bits": 1.0}, (), "even the narrowest takes more"),
        ("int4/channel", "hqq", {}, (), "methods .* take it; hqq takes int4/g32/min$"),
        ("int2/g32", "vptq", {}, (), "methods .* take it; vptq takes vector4x8/g64$"),
        ("nf4/g32", "autoround", {}, (), "by autoround .*; methods .* take it; autoround takes int4/g128/sym$"),
        ("int1/channel/min", "ptq161", {}, ("rotate",), r"max \|x\| of mixed inputs"),
        ("int1/channel/min", "ptq161", {}, ("hadamard",), r"max \|x\| of mixed inputs"),
    ],
)
def test_what_no_run_could_do_is_refused_by_the_plan(
    tiny: Path, format: str, method: str, options: dict[str, Any], transforms: tuple[str, ...], why: str
) -> None:
    """Of language models and of networks, before anything is loaded or run."""
    asked: dict[str, Any] = {"method": method, "options": options, "transforms": transforms}
    with pytest.raises(FewbitError, match=why):
        fewbit.plan(tiny, format, **asked, force=True)
    with pytest.raises(FewbitError, match=why):
        fewbit.network.quantize(_Still(torch.nn.Linear(64, 64)), format, [torch.zeros(1, 64)], **asked)


class _Still(torch.nn.Sequential):
    """A network that is never to run."""

    def forward(self, *inputs: object) -> torch.Tensor:
        raise AssertionError("it ran before it was refused")


def test_refitted_groups_of_whole_rows_may_follow_activity(tiny: Path) -> None:
    fewbit.plan(tiny, "int4/channel/asym", method="gptq", options=IN_TURN)


def test_what_fused_experts_cannot_share_is_refused_by_the_plan(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("mixtral")
    fewbit.plan(folder, "palette4/row")
    with pytest.raises(FewbitError, match=r"fused experts.*share would have to differ"):
        fewbit.plan(folder, "palette4")
