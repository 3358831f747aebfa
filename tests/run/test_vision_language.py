# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: the text model is quantized, what it sees with stays as it is unless a rule names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app
from fewbit.decode import open_engine
from fewbit.errors import UnsupportedError
from fewbit.model.layers import ExpertBank, QuantEmbedding, QuantLinear
from fewbit.recipe import Recipe, Rule

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


@pytest.mark.parametrize(
    ("vision", "family"),
    # kept in float, it is seen to be that of the original of every family below
    [
        *(("int8/g8", family) for family in FAMILIES),
        *(("float", family) for family in ("llava", "smolvlm", "qwen3-vl-moe")),
    ],
)
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
    assert all(isinstance(loaded.get_submodule(name), QuantLinear) for name in quantized)


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
    kept = [(d.site.parameter, d.reason) for d in planned.decisions if d.rule is None]
    kept += [(name, reason) for name, reason, _ in planned.kept]
    for entries in (kept, [(entry["name"], entry["reason"]) for entry in manifest["skipped"]]):
        told = {name: reason for name, reason in entries if name.startswith(sees)}
        assert told.keys() == names
        assert all(reason.startswith("of the vision tower or projector") for reason in told.values())
    for name in names:
        assert torch.equal(before.get_parameter(name), after.get_parameter(name)), name


@pytest.mark.parametrize(
    ("match", "reached"),
    [
        ("*", False),
        ("model.*", False),
        ("class:Linear", False),
        ("kind:linear", False),
        ("kind:vision", True),
        ("model.vision_tower.*", True),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", True),
        ("re:.*fc1", True),
    ],
)
def test_only_rules_that_name_them_reach_layers_that_see(match: str, reached: bool) -> None:
    name = "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert Rule(match, "int8/g8").matches(name, "vision", "Linear") == reached


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ({"method": "gptq"}, "int4/g8 by gptq for model.vision_tower.*calibration is text; method rtn or hqq alone"),
        ({"method": "rtn", "tune": ["scales"]}, "int4/g8 by rtn and scales for"),
        ({"method": "rtn", "transforms": ["smooth"]}, "int4/g8 by rtn and smooth for"),
        ({"activation": "int8/static/asym/mse"}, "inputs in int8/static.*alone, activations in int8/channel,"),
    ],
)
def test_what_needs_calibration_is_refused_for_layers_that_see(
    tiny_family: TinyFamily, rule: dict[str, Any], found: str
) -> None:
    rules = [{"match": "kind:vision", "format": "int4/g8", **rule}, {"match": "*", "format": "int8/g8"}]
    with pytest.raises(UnsupportedError, match=found):
        fewbit.plan(tiny_family("llava"), Recipe.from_dict({"rule": rules}))


def test_calibrated_methods_see_text_in_the_text_model(tmp_path: Path, tiny_family: TinyFamily) -> None:
    tune = [{"name": "scales", "iters": 2}]
    folder, more = tiny_family("qwen2.5-vl"), {"samples": 4, "context": 16, "force": True}
    manifest = fewbit.quantize(folder, "int4/g8", method="gptq", out=tmp_path / "out", tune=tune, **more).manifest
    inside = [layer for layer in manifest["layers"] if layer["block"] is not None]
    assert inside and all(layer["tokens"] == 4 * 16 and layer["method"] == "gptq" for layer in inside)


def test_older_files_are_taken(tmp_path: Path, tiny_family: TinyFamily, tiny_models: Any) -> None:
    """As the hub has Qwen2-VL: one configuration for all, other names of arrays; and processor files beside them."""
    folder, out = tiny_family("qwen2-vl"), tmp_path / "out"
    model, call = original(folder), tiny_models.picture("qwen2-vl")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    arrays = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    assert open_engine(folder).name == "native"
    fewbit.quantize(folder, everything("int8/g8"), out=out, force=True)
    loaded = fewbit.load(out)
    torch.testing.assert_close(logits(loaded, call), logits(dense(folder, loaded), call), rtol=1e-4, atol=5e-5)
    assert (out / "preprocessor_config.json").is_file()
    engine = open_engine(out, kv="float32")
    assert engine.name == "native"
    plain = {"input_ids": torch.tensor([[5, 9, 30, 4]])}
    found = engine.feed([(engine.open(), [5, 9, 30, 4])])[0]
    torch.testing.assert_close(found, logits(loaded, plain)[0, -1], rtol=1e-4, atol=5e-5)


def test_commands_tell_what_is_kept_and_evaluate_text(tmp_path: Path, tiny_family: TinyFamily) -> None:
    folder, out = tiny_family("smolvlm"), tmp_path / "out"
    run = CliRunner()
    done = run.invoke(app, ["quantize", str(folder), "--format", "int8/g8", "-o", str(out), "--force"])
    assert done.exit_code == 0, done.output
    assert "vision tower and projector" in done.output
    done = run.invoke(
        app, ["eval", str(out), "--max-tokens", "128", "--decode-tokens", "0", "--json", str(tmp_path / "found.json")]
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kl_mean"] < 0.01 and found["reference"]["perplexity"] > 1
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText, AutoProcessor" in card and "pipeline_tag: image-text-to-text" in card
