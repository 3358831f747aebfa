# SPDX-License-Identifier: Apache-2.0
"""Blocks tuned on their output: what is compared, what is kept, and that the bytes do not depend on how it ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import calibrate
from fewbit.errors import SpecError, UnsupportedError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe
from fewbit.run import reconstruct, sequential
from fewbit.run.events import Event
from fewbit.run.rewriting import as_run
from fewbit.run.verify import read_back

Short = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]
STEPS = {"iters": 12, "batch": 4}
ROUNDING, SCALES = {"name": "rounding", **STEPS}, {"name": "scales", **STEPS, "lr": 0.01}


def tensors(hashes: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in hashes.items() if name.startswith("model-")}


class Notes:
    """What was told of tunings: (error before, error after) in the order of the blocks."""

    def __init__(self) -> None:
        self.errors: list[tuple[float, float]] = []

    def __call__(self, event: Event) -> None:
        if found := re.search(r"output error ([\d.]+)% -> ([\d.]+)%", event.message):
            self.errors.append((float(found[1]) / 100, float(found[2]) / 100))


def test_no_step_is_rounding_to_nearest_bit_for_bit(tmp_path: Path, short: Short, hashes: Hashes) -> None:
    short(tmp_path / "rtn", "int3/g32/asym", "rtn")
    short(tmp_path / "none", "int3/g32/asym", "autoround", options={"iters": 0})
    assert tensors(hashes(tmp_path / "none")) == tensors(hashes(tmp_path / "rtn"))


def test_steps_that_lose_are_not_kept(tmp_path: Path, short: Short, hashes: Hashes) -> None:
    notes = Notes()
    wild = {"iters": 4, "batch": 1, "lr": 1.0}
    short(tmp_path / "rtn", "int4/g32/asym", "rtn")
    short(tmp_path / "wild", "int4/g32/asym", "autoround", options=wild, progress=notes)
    assert notes.errors and all(after == before for before, after in notes.errors)
    assert tensors(hashes(tmp_path / "wild")) == tensors(hashes(tmp_path / "rtn"))


def test_the_error_told_is_that_of_the_file(tmp_path: Path, short: Short, tiny: Path) -> None:
    """The first block worked out without the pipeline: the float path beside the path through what the folder holds."""
    notes = Notes()
    result = short(
        tmp_path / "out", "int2/g32/asym", "gptq", tune=[ROUNDING, SCALES], calibration_dtype="float32", progress=notes
    )
    assert len(notes.errors) == 4 and all(after <= before for before, after in notes.errors)
    assert all(after < before for before, after in notes.errors[1::2]), "scales find something to gain"
    floating, quantized = (StreamedModel.open(open_checkpoint(tiny)) for _ in range(2))
    floating.load("")
    quantized.load("")
    for record in result.manifest["layers"]:
        shard = next(
            p for p in sorted(result.path.glob("model-*")) if record["name"].encode() in p.read_bytes()[:65536]
        )
        quantized.set_weight(record["name"], read_back(shard, record).dequantize())
    data = calibrate.calibration(open_checkpoint(tiny).tokenizer(), None, 8, 64, 0)
    with torch.no_grad():
        wanted, got = (model.begin(data.ids) for model in (floating, quantized))
        for block in range(2):
            wanted, got = (
                type(inputs)(model.run_block(block, inputs.hidden, inputs), inputs.calls)
                for model, inputs in ((floating, wanted), (quantized, got))
            )
            size = wanted.hidden.norm(dim=-1, keepdim=True)
            error = float(((got.hidden - wanted.hidden) / size).square().sum(-1).mean().sqrt())
            assert error == pytest.approx(notes.errors[2 * block + 1][1], rel=2e-3)  # told with 3 digits


def test_bytes_do_not_depend_on_threads_or_interruptions(tmp_path: Path, short: Short, hashes: Hashes) -> None:
    tune = [ROUNDING, SCALES]
    short(tmp_path / "whole", "int3/g32/asym", "gptq", tune=tune, threads=1)

    def stop(event: Event) -> None:
        if "layers.1" in event.message and "scales" in event.message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        short(tmp_path / "cut", "int3/g32/asym", "gptq", tune=tune, threads=3, progress=stop)
    assert not (tmp_path / "cut").exists()
    messages: list[str] = []
    short(
        tmp_path / "cut", "int3/g32/asym", "gptq", tune=tune, threads=3, progress=lambda e: messages.append(e.message)
    )
    assert any("continuing" in message for message in messages)
    assert not any("layers.0: output error" in message for message in messages), "the first block was done"
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_weights_rounded_once_a_step_give_the_bytes_of_weights_rounded_with_every_window(
    tmp_path: Path, short: Short, hashes: Hashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[set[torch.dtype]] = []
    good = reconstruct._Phase._multiplied

    def noted(phase: Any, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        given.append({weight.dtype for weight in good(phase, weights)})
        return good(phase, weights)

    options = {"options": STEPS, "calibration_dtype": "bfloat16"}
    monkeypatch.setattr(reconstruct._Phase, "_multiplied", noted)
    short(tmp_path / "once", "int3/g32/asym", "autoround", **options)
    assert given and all(dtypes == {torch.bfloat16} for dtypes in given)
    monkeypatch.setattr(reconstruct._Phase, "_multiplied", lambda phase, weights: weights)
    short(tmp_path / "each", "int3/g32/asym", "autoround", **options)
    assert tensors(hashes(tmp_path / "once")) == tensors(hashes(tmp_path / "each"))


@pytest.mark.parametrize(
    ("format", "transforms", "dtype"),
    [("int4/g32/asym", ["rotate"], "float32"), ("W4A8", ["smooth"], "float32"), ("int4/g32/sym", [], "bfloat16")],
)
def test_a_block_is_tuned_as_it_will_run(
    tmp_path: Path, short: Short, monkeypatch: pytest.MonkeyPatch, format: str, transforms: list[str], dtype: str
) -> None:
    """Inputs rewritten and rounded, products in the dtype of the calibration: the loss before any step is that of the
    block as the pipeline runs it."""
    losses, power, told = [], [], Notes()
    good = sequential.tune_block

    def both(run: Any, stage: int, index: int, solved: Any) -> Any:
        before, after = run.hidden(stage - 1, "calibration"), run.hidden(stage, "reference")
        with as_run(run.model, solved), run.arithmetic():
            batches = range(len(run.texts.batches))
            got = [run.model.run_block(index, before.read(i), run.inputs("calibration")) for i in batches]
        wanted = [after.read(i) for i in batches]
        losses.append(sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True)))
        power.append(sum(float(b.square().sum()) for b in wanted))
        return good(run, stage, index, solved)

    monkeypatch.setattr(sequential, "tune_block", both)
    short(
        tmp_path / "out",
        format,
        "rtn",
        transforms=transforms,
        tune=[{**SCALES, "relative": 0}],
        calibration_dtype=dtype,
        progress=told,
    )
    for (before, after), lost, whole in zip(told.errors, losses, power, strict=True):
        assert before == pytest.approx((lost / whole) ** 0.5, rel=2e-3)
        assert after < before


def test_bounds_are_learned_block_by_block_too(tmp_path: Path, short: Short, tiny: Path) -> None:
    told = Notes()
    short(tmp_path / "out", "int2/channel/asym", "clip", tune=[{"name": "bounds", **STEPS}], progress=told)
    assert told.errors and all(after < before for before, after in told.errors)


def test_some_layers_are_tuned_and_others_stand_still(tmp_path: Path, short: Short, hashes: Hashes) -> None:
    rule = {"match": "*", "format": "int3/g32/asym", "method": "rtn"}
    recipe = {
        "rule": [
            {**rule, "match": "*.down_proj", "tune": [SCALES]},
            {**rule, "match": "*.q_proj", "method": "autoround", "options": STEPS},
            {"match": "*.k_proj", "format": "float"},
            rule,
        ]
    }
    assert Recipe.from_dict(recipe).to_dict() == recipe
    result = short(tmp_path / "some", Recipe.from_dict(recipe))
    plain = short(tmp_path / "plain", "int3/g32/asym", "rtn", head="float")
    decoded = [{layer["name"]: layer["decoded_sha256"] for layer in one.manifest["layers"]} for one in (result, plain)]
    changed = {name.rpartition(".")[2] for name in decoded[0] if decoded[0][name] != decoded[1][name]}
    assert changed == {"down_proj", "q_proj"}


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ([{"match": "*", "format": "nf4/g32", "method": "autoround"}], "not evenly spaced"),
        ([{"match": "*", "format": "mxfp4", "tune": ["scales"]}], "no float16 number"),
        ([{"match": "kind:embedding", "format": "int8/g32", "tune": ["scales"]}], "in no block"),
    ],
)
def test_the_plan_says_what_cannot_be_tuned(tiny: Path, recipe: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        fewbit.plan(tiny, Recipe.from_dict({"rule": recipe}))


def test_experts_are_refused(tiny_family: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="routed to them"):
        fewbit.plan(tiny_family("mixtral"), "int4/g32/asym", method="autoround")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, short: Short) -> None:
    with pytest.raises(SpecError, match="no such device"):
        short(tmp_path / "out", "int3/g32/asym", "autoround", device="abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("transforms", [[], ["rotate"], ["smooth"]])
def test_a_gpu_does_what_the_processor_does(tmp_path: Path, short: Short, transforms: list[str]) -> None:
    notes = {device: Notes() for device in ("cpu", "cuda")}
    for device, told in notes.items():
        more: dict[str, Any] = {"transforms": transforms, "tune": [ROUNDING, SCALES], "device": device}
        short(tmp_path / device, "int3/g32/asym", "rtn", calibration_dtype="float32", progress=told, **more)
    for here, there in zip(notes["cpu"].errors, notes["cuda"].errors, strict=True):
        assert there[:2] == pytest.approx(here[:2], rel=0.1)  # signs of small gradients differ


@pytest.mark.parametrize(
    "entry", ["nothing", {"name": "scales", "iters": 1.5}, {"name": "scales", "lr": -1}, {"name": "scales", "x": 1}, 3]
)
def test_unknown_tunings_and_options(entry: Any) -> None:
    with pytest.raises(SpecError):
        Recipe.simple("int4/g32", tune=[entry])


def test_another_architecture(tmp_path: Path, tiny_family: Callable[[str], Path]) -> None:
    """GPT-2: weights that lie transposed; its block runs group by group."""
    notes = Notes()
    fewbit.quantize(
        tiny_family("gpt2"),
        "int3/g32/asym",
        method="autoround",
        options=STEPS,
        out=tmp_path / "out",
        samples=8,
        context=32,
        progress=notes,
    )
    assert notes.errors and all(after < before for before, after in notes.errors)
