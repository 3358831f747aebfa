# SPDX-License-Identifier: Apache-2.0
"""What the whole model learns in the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import calibrate
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods.scales import Scales
from fewbit.model.checkpoint import open_checkpoint
from fewbit.recipe import Recipe
from fewbit.run import again
from fewbit.run.events import Event
from fewbit.run.verify import read_back
from fewbit.run.whole import Whole, stored

Short = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]
DISTILL: dict[str, Any] = {"name": "distill", "iters": 8, "batch": 4}
FLOAT32: dict[str, Any] = {"calibration_dtype": "float32"}


def shards(hashes: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in hashes.items() if name.startswith("model-")}


def held_out(model: Path) -> Tensor:
    """Ids of the window that runs of eight hold out."""
    return calibrate.calibration(open_checkpoint(model).tokenizer(), None, 8, 64, 0).ids[-1]


def exact(model: Any) -> Any:
    """``model`` in float64, norms too, which else compute in float32."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
            )
    return model


def test_the_gradient_of_a_scale_is_that_of_finite_differences(
    tmp_path: Path, short: Short, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, the KL of transformers' own model, a block's scale moved a little up and down."""
    layer, far = "model.layers.0.mlp.down_proj", 1e-4
    teacher, student = (exact(AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa")) for _ in range(2))
    found: dict[str, Any] = {}

    def look(run: Any) -> None:
        whole = Whole(run)
        loss, grads = whole.gradients()
        for member, grad in zip(whole._members, grads, strict=True):
            if member.parts[0].layer == layer:
                slopes = member.learner.gradient(member.descent.values, grad)["scale"]
                row, block = divmod(int(slopes.abs().argmax()), slopes.shape[1])
                found["ours"] = float(slopes[row, block])
        whole.close()
        for item in stored(run):
            student.get_submodule(item.record["name"]).weight.data.copy_(item.weight.dequantize())
        for name, _ in run.model.kept:
            place = student.get_parameter(name)
            place.data.copy_(place.to(run.plan.kept_dtype))
        weight = student.get_submodule(layer).weight.data
        ids = run.texts.calibration.ids[:-1]
        wanted = teacher(ids).logits[:, :-1].log_softmax(-1)

        def kl() -> float:
            made = student(ids).logits[:, :-1].log_softmax(-1)
            return float((wanted.exp() * (wanted - made)).sum(-1).mean())

        found["loss"], found["kl"] = loss, kl()
        part, ends = weight[row, 32 * block : 32 * (block + 1)], []
        before = part.clone()
        for factor in (1 + far, 1 - far):
            part.copy_(before * factor)
            ends.append(kl())
        found["slope"] = (ends[0] - ends[1]) / (2 * far)

    monkeypatch.setattr(again, "learn_whole", look)
    end = {**DISTILL, "batch": 7}
    short(tmp_path / "out", "int3/g32/sym", "rtn", tune=[end], **FLOAT32)
    assert found["loss"] == pytest.approx(found["kl"], rel=1e-4)
    assert abs(found["slope"]) > 1e-7
    assert found["ours"] == pytest.approx(found["slope"], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["distill", "distill-codes"])
def test_a_gpu_does_what_the_processor_does(tmp_path: Path, short: Short, name: str) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        more: dict[str, Any] = {"tune": [{**DISTILL, "name": name, "lr": 0.02}], "device": device, **FLOAT32}
        ends.append(short(tmp_path / device, "int3/g32/asym", "rtn", **more).manifest["end"])
    assert ends[1]["before"] == pytest.approx(ends[0]["before"], rel=1e-3)
    assert ends[1]["after"] < ends[1]["before"]
    if name == "distill":
        assert ends[1]["after"] == pytest.approx(ends[0]["after"], rel=0.1)
    else:  # codes learn by signs, which differ where gradients are small: a GPU ends elsewhere, but no worse
        assert ends[1]["after"] < 1.5 * ends[0]["after"]


@pytest.mark.timeout(400)  # two runs and two measurements: 14 s of a processor, which has been a minute and a half
@pytest.mark.parametrize(
    ("format", "method", "transforms", "options"),
    [
        ("W4A8", "rtn", ["smooth"], {"lr": 0.02}),
        ("int3/g32/asym", "rtn", ["rotate"], {"name": "distill-codes", "lr": 0.02}),
        ("int2/g32/asym", "gptq", [], {"name": "distill-weights", "lr": 0.02, "warmup": 2}),
        ("sign/g32", "billm", [], {}),
    ],
)
def test_the_loss_is_the_divergence_that_eval_measures(
    tmp_path: Path,
    short: Short,
    tiny: Path,
    probe_kl: Callable[[Any], float],
    format: str,
    method: str,
    transforms: list[str],
    options: Any,
) -> None:
    """Before and after, on the window held out: of the folder as ``fewbit eval`` runs it. And the check of the run."""
    more = {"transforms": transforms, "force": True, **FLOAT32}
    plain = short(tmp_path / "plain", format, method, **more)
    tuned = short(tmp_path / "tuned", format, method, tune=[{**DISTILL, **options}], **more)
    end, ids = tuned.manifest["end"], held_out(tiny)
    close = 1e-2 if format == "W4A8" else 1e-3  # an input half-way between integers goes either way by its last bit
    for result, expected in ((plain, end["before"]), (tuned, end["after"])):
        measured = fewbit.evaluate(result.path, tiny, ids, context=64, decode_tokens=0)
        assert measured.kl_mean == pytest.approx(expected, rel=close)
    assert end["after"] < end["before"] and end["still"] == {}
    assert abs(probe_kl(fewbit.load(tuned.path)) / tuned.manifest["check"]["kl_mean"] - 1) < 0.02
    assert tuned.manifest["bits_per_weight"] == plain.manifest["bits_per_weight"]
    assert tuned.manifest["size_bytes"] == plain.manifest["size_bytes"]


def test_codes_stand_still_and_scales_and_norms_move(tmp_path: Path, short: Short) -> None:
    runs = [short(tmp_path / str(one), tune=[DISTILL] if one else [], **FLOAT32) for one in range(2)]
    files = [{p.name: p for p in run.path.glob("model-*")} for run in runs]
    changed = 0
    for before, after in zip(*(run.manifest["layers"] for run in runs), strict=True):
        shard = next(name for name, p in files[0].items() if before["name"].encode() in p.read_bytes()[:65536])
        old, new = (read_back(where[shard], one) for where, one in zip(files, (before, after), strict=True))
        assert torch.equal(old.logical()[0], new.logical()[0])
        changed += before["decoded_sha256"] != after["decoded_sha256"]
        assert before["block"] is not None or before["decoded_sha256"] == after["decoded_sha256"]
        assert before["relative_error"] is None or after["relative_error"] < 2 * before["relative_error"]
    assert changed == 14
    norms = [fewbit.load(run.path).get_parameter("model.norm.weight") for run in runs]
    assert not torch.equal(*norms)
    still = short(tmp_path / "still", tune=[{**DISTILL, "vectors": 0}], **FLOAT32)
    assert torch.equal(fewbit.load(still.path).get_parameter("model.norm.weight"), norms[0])


def test_what_loses_is_not_kept(tmp_path: Path, short: Short, hashes: Hashes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither steps that lose, nor values of which files would hold others."""
    wild = short(tmp_path / "wild", tune=[{**DISTILL, "iters": 2, "lr": 1.0}])
    good = Scales.freeze
    monkeypatch.setattr(Scales, "freeze", lambda one, v: good(one, {name: a - 0.3 for name, a in v.items()}))
    lost = short(tmp_path / "lost", tune=[DISTILL])
    short(tmp_path / "plain")
    for name, run in (("wild", wild), ("lost", lost)):
        assert run.manifest["end"]["after"] == run.manifest["end"]["before"]
        assert shards(hashes(tmp_path / name)) == shards(hashes(tmp_path / "plain"))


def test_bytes_do_not_depend_on_threads_or_interruptions(
    tmp_path: Path, short: Short, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two steps, and again while new shards take the places of old ones."""
    tune = ["scales", DISTILL]
    more: dict[str, Any] = {"format": "int3/g32/asym", "tune": [{"name": "scales", "iters": 2}, DISTILL]}
    short(tmp_path / "whole", threads=1, **more)
    assert Recipe.simple("int4", tune=tune).end is not None

    def stop(event: Event) -> None:
        if event.kind == "step" and event.block == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(tmp_path / "cut", threads=3, progress=stop, **more)
    moved: list[str] = []

    def once(old: Path, new: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(new.name)
        os.rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(again, "os", type("os", (), {"replace": staticmethod(once)}))
        short(tmp_path / "cut", threads=3, **more)
    assert moved and not (tmp_path / "cut").exists()
    steps: list[Event] = []
    short(tmp_path / "cut", threads=3, progress=lambda e: steps.append(e) if e.kind == "step" else None, **more)
    assert not steps, "it was learned"
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_more_text_for_the_whole_than_for_blocks(tmp_path: Path, short: Short, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are calibrated on some of its windows, from all over it; the rate rises, then falls."""
    rates: list[float] = []

    def step(whole: Whole, share: float) -> float:
        assert len(whole._ids) == 16
        rates.append(share)
        return 0.0

    monkeypatch.setattr(Whole, "_step", step)
    result = short(tmp_path / "out", samples=4, tune=[{**DISTILL, "windows": 16, "warmup": 2}], **FLOAT32)
    found = result.manifest["calibration"]
    assert (found["samples"], found["whole"]["samples"]) == (4, 16)
    whole = calibrate.calibration(open_checkpoint(Path(result.manifest["source"]["path"])).tokenizer(), None, 16, 64, 0)
    assert found["whole"]["sha256"] == whole.sha256
    assert found["sha256"] == calibrate.Calibration("", whole.ids[::4].contiguous()).sha256
    assert rates == pytest.approx([1 / 3, 2 / 3, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_another_architecture(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    """GPT-2: weights that lie transposed, a head tied to its embedding, biases."""
    model = tiny_family("gpt2")
    more: dict[str, Any] = {"samples": 8, "context": 32, **FLOAT32}
    result = fewbit.quantize(model, "int3/g32/asym", out=tmp_path / "out", tune=[DISTILL], **more)
    end = result.manifest["end"]
    ids = calibrate.calibration(open_checkpoint(model).tokenizer(), None, 8, 32, 0).ids[-1]
    measured = fewbit.evaluate(result.path, model, ids, context=32, decode_tokens=0)
    assert end["after"] < end["before"]
    assert measured.kl_mean == pytest.approx(end["after"], rel=0.1, abs=1e-7), "so small that float32 shows"


def test_labels(tmp_path: Path, short: Short, tiny: Path) -> None:
    """The loss of the next token, added."""
    result = short(tmp_path / "out", "int2/g32/asym", tune=[{**DISTILL, "iters": 0, "label": 0.5}], **FLOAT32)
    measured = fewbit.evaluate(result.path, tiny, held_out(tiny), context=64, decode_tokens=0)
    expected = measured.kl_mean + 0.5 * torch.tensor(measured.perplexity).log()
    assert result.manifest["end"]["before"] == pytest.approx(float(expected), rel=1e-3)


def test_recipes_and_refusals(tmp_path: Path, tiny: Path, short: Short) -> None:
    recipe = Recipe.simple("int4/g32", tune=["scales", DISTILL])
    assert recipe.to_dict()["end"] == DISTILL and [one.name for one in recipe.rules[-1].tune] == ["scales"]
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.read(tmp_path / "recipe.toml") == recipe
    with pytest.raises(SpecError, match="put it last"):
        Recipe.simple("int4/g32", tune=["distill", "scales"])
    for entry in ({"name": "distill", "iters": -1}, {"name": "distill", "relative": 1.0}):
        with pytest.raises(SpecError):
            Recipe.simple("int4/g32", tune=[entry])
    with pytest.raises(SpecError, match="facts hold none"):
        short(tmp_path / "out", tune=["distill"], facts=tmp_path)
    with pytest.raises(UnsupportedError, match="no layer"):
        fewbit.plan(tiny, Recipe.simple("mxfp4", tune=["distill"]))
