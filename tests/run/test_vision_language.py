# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: the text model is quantized, what it sees with stays as it is unless a rule names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import SpecError, UnsupportedError
from fewbit.model.layers import ExpertBank, QuantEmbedding, QuantLinear
from fewbit.recipe import Recipe

TinyFamily = Callable[[str], Path]
FAMILIES = {
    "gemma3-vision": ("vision_tower", "multi_modal_projector"),
    "llava": ("vision_tower", "multi_modal_projector"),
    "mistral3": ("vision_tower", "multi_modal_projector"),
    "idefics3": ("vision_model", "connector"),
    "smolvlm": ("vision_model", "connector"),
    "qwen2-vl": ("visual",),
    "qwen2.5-vl": ("visual",),
    "qwen3-vl": ("visual",),
    "qwen3-vl-moe": ("visual",),
}
"""What each sees with, below ``model``."""

pytestmark = pytest.mark.usefixtures("one_thread")


def everything(vision: str) -> Recipe:
    rules = [{"match": "kind:vision", "format": vision}, {"match": "*", "format": "int8/g8"}]
    return Recipe.from_dict({"rule": [*rules, {"match": "kind:head", "format": "int8/g8"}]})


def original(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def dense(folder: Path, quantized: nn.Module) -> Any:
    """The original, with what the layers of ``quantized`` decode to in place of its own."""
    model = original(folder)
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear | QuantEmbedding | ExpertBank):
            own = model.get_parameter(name if isinstance(layer, ExpertBank) else f"{name}.weight")
            own.data.copy_(layer.weight_of().dequantize().reshape(own.shape))
    return model


def logits(model: Any, call: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**call, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", ["float", "int8/g8"])
def test_text_and_image_go_through_what_is_stored(
    tmp_path: Path, tiny_family: TinyFamily, tiny_models: Any, family: str, vision: str
) -> None:
    folder, out = tiny_family(family), tmp_path / "out"
    manifest = fewbit.quantize(folder, everything(vision), out=out, force=True).manifest
    loaded, call = fewbit.load(out), tiny_models.picture(family)
    found = logits(loaded, call)
    torch.testing.assert_close(found, logits(dense(folder, loaded), call), rtol=1e-4, atol=5e-5)
    # the image is seen, and by quantized layers where they are asked for
    other = {**call, "pixel_values": call["pixel_values"].flip(-1)}
    assert (logits(loaded, other) - found).abs().max() > 1e-4
    sees = tuple(f"model.{part}." for part in FAMILIES[family])
    quantized = [layer["name"] for layer in manifest["layers"] if layer["name"].startswith(sees)]
    assert bool(quantized) == (vision != "float")
    assert all(loaded.get_submodule(name).shape for name in quantized)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_sees_with_is_kept_and_told(tmp_path: Path, tiny_family: TinyFamily, family: str) -> None:
    folder, out = tiny_family(family), tmp_path / "out"
    planned = fewbit.plan(folder, "int4/g8", head="int8/g8")
    manifest = fewbit.quantize(folder, "int4/g8", head="int8/g8", out=out, force=True).manifest
    sees = tuple(f"model.{part}." for part in FAMILIES[family])
    before, after = original(folder), fewbit.load(out)
    names = {name for name, _ in before.named_parameters() if name.startswith(sees)}
    assert names
    assert not any(layer["name"].startswith(sees) for layer in manifest["layers"])
    for entries in (
        manifest["skipped"],
        [{"name": f"{d.site.parameter}", "reason": d.reason} for d in planned.decisions if d.rule is None]
        + [{"name": name, "reason": reason} for name, reason, _ in planned.kept],
    ):
        told = {entry["name"]: entry["reason"] for entry in entries if entry["name"].startswith(sees)}
        assert told.keys() == names
        assert all(reason.startswith("of the vision tower or projector") for reason in told.values())
    for name in names:
        assert torch.equal(before.get_parameter(name), after.get_parameter(name)), name
