# SPDX-License-Identifier: Apache-2.0
"""Same input, same seed: the same bytes, at any thread count, and nobody's global state is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.errors import InputError, QualityError, ResumeError, SpecError
from fewbit.recipe import Recipe
from fewbit.run import ending

Short = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
def test_same_bytes_at_any_thread_count(short: Short, hashes: Hashes, tmp_path: Path, method: str) -> None:
    for threads in (1, 3):
        short(tmp_path / str(threads), method=method, threads=threads)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


def test_global_state_is_untouched(short: Short, tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    short(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_another_seed_is_another_calibration(short: Short, tmp_path: Path) -> None:
    one, two = (short(tmp_path / str(seed), seed=seed).manifest["calibration"] for seed in (0, 1))
    assert one["sha256"] != two["sha256"]


def test_size_and_bits_of_the_plan_are_those_of_the_files(short: Short, tiny: Path, tmp_path: Path) -> None:
    plan = fewbit.plan(tiny, "int3/g32/asym", method="gptq")
    manifest = short(tmp_path / "out", "int3/g32/asym").manifest
    assert plan.bits_per_weight == manifest["bits_per_weight"]
    headers = 0
    for path in (tmp_path / "out").glob("*.safetensors"):
        headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert plan.size_bytes == manifest["size_bytes"] - headers
    assert {d.site.name: d.nbytes for d in plan.decisions if d.rule} == {
        layer["name"]: layer["nbytes"] for layer in manifest["layers"]
    }


def test_every_parameter_is_a_layer_or_skipped_with_a_reason(short: Short, tmp_path: Path) -> None:
    manifest = short(tmp_path / "out").manifest
    assert all(entry["reason"] for entry in manifest["skipped"])
    stored = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    layers = {key.partition(".weight_")[0] for key in stored if ".weight_" in key}
    assert layers == {layer["name"] for layer in manifest["layers"]}
    assert {key for key in stored if ".weight_" not in key} == {
        entry["name"] for entry in manifest["skipped"] if not entry.get("tied_to")
    }


def test_below_three_bits_without_data_is_refused(short: Short, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="below 3 bits"):
        short(tmp_path / "out", "int2/g32/asym", "rtn")
    assert short(tmp_path / "out", "int2/g32/asym", "rtn", force=True).path.exists()


def test_a_broken_result_is_kept_but_not_named(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "MOST_KL", -1.0)
    with pytest.raises(QualityError, match="--force"):
        short(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert short(tmp_path / "out", force=True).path.exists()


@pytest.mark.parametrize(
    ("changed", "field"),
    [({"seed": 1}, "seed"), ({"samples": 7}, "calibration"), ({"format": "int4/g32/sym"}, "recipe")],
)
def test_a_changed_setting_is_refused_by_name(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(ending, "MOST_KL", -1.0)  # leaves a finished journal behind
    with pytest.raises(QualityError):
        short(tmp_path / "out")
    with pytest.raises(ResumeError, match=f"{field} was"):
        short(tmp_path / "out", **changed)


@pytest.mark.parametrize(
    ("method", "tune", "advice"),
    [
        ("rtn", [], "smaller groups, a calibrated method; or"),
        ("gptq", [], "smaller groups, a tuning such as --tune scales; or"),
        ("gptq", ["scales"], "smaller groups; or"),
    ],
)
def test_the_gate_advises_what_was_not_tried(method: str, tune: list[str], advice: str) -> None:
    recipe = Recipe.simple("int4/g32/asym", method, tune=tune)
    check = {"perplexity": 100.0, "reference_perplexity": 2.0, "kl_mean": 9.0}
    with pytest.raises(QualityError, match=advice):
        ending._judge(check, False, Path("out"), recipe)
    ending._judge(check, True, Path("out"), recipe)


def test_changed_weights_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    monkeypatch.setattr(ending, "MOST_KL", -1.0)
    with pytest.raises(QualityError):
        fewbit.quantize(model, "int4/g32", out=tmp_path / "out")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ResumeError, match="weights was"):
        fewbit.quantize(model, "int4/g32", out=tmp_path / "out")


def test_the_same_command_twice_does_nothing_and_another_one_refuses(
    short: Short, hashes: Hashes, tmp_path: Path
) -> None:
    short(tmp_path / "out")
    before = hashes(tmp_path / "out")
    short(tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    with pytest.raises(InputError, match="exists already"):
        short(tmp_path / "out", seed=5)


def test_nan_weights_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*1 NaN"):
        fewbit.quantize(model, "int4/g32", out=tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(tiny))


def test_a_model_on_the_meta_device_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny).to("meta")
    with pytest.raises(InputError, match=r"embed_tokens\.weight is on the meta device"):
        fewbit.quantize(model, "int4/g32", out=tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(tiny))
    assert not list(tmp_path.iterdir())


def test_group_that_does_not_divide_gets_a_shorter_last_group(short: Short, tmp_path: Path) -> None:
    manifest = short(tmp_path / "out", "int4/g48/asym").manifest
    layer = next(layer for layer in manifest["layers"] if layer["name"].endswith("0.mlp.up_proj"))
    assert layer["nbytes"] == 128 * (64 // 2 + 2 * 2 + 1)  # 64 columns: groups of 48 and 16, two 4-bit zeros a byte


def test_a_calibration_file_without_text_or_too_short(short: Short, tmp_path: Path) -> None:
    empty, brief = tmp_path / "empty.txt", tmp_path / "brief.txt"
    empty.write_text(" \n")
    brief.write_text("hello")
    with pytest.raises(InputError, match="holds no text"):
        short(tmp_path / "out", calibration=empty)
    with pytest.raises(InputError, match="it has 5 tokens; give at least 64, or a context of at most 5 tokens"):
        short(tmp_path / "out", calibration=brief)
    brief.write_text("h")
    with pytest.raises(InputError, match=r"it has 1 token; give at least 64$"):
        short(tmp_path / "out", calibration=brief)
    with pytest.raises(InputError, match=r"cannot be read.*give a \.txt or \.jsonl file"):
        short(tmp_path / "out", calibration=tmp_path)
