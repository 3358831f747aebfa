# SPDX-License-Identifier: Apache-2.0
"""Transforms in a run: exact bytes, the same bytes, seeded faults, and refusals before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewbit
from fewbit.core.facts import Facts
from fewbit.core.rewrite import Chain
from fewbit.errors import QualityError, ResumeError, SpecError, UnsupportedError, VerificationError
from fewbit.model.sites import Site
from fewbit.recipe import Recipe, Rule, Step
from fewbit.run import stages
from fewbit.run.events import Event
from fewbit.run.solve import Solved, Task, solve

Short = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]
BOTH = ["smooth", "rotate"]


def stored(out: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("transforms", [["smooth"], ["rotate"], ["awq"], BOTH])
def test_law_5_plan_manifest_and_files_agree_on_every_byte(
    short: Short, tiny: Path, tmp_path: Path, transforms: list[str]
) -> None:
    plan = fewbit.plan(tiny, "int4/g32/asym", transforms=transforms)
    manifest = short(tmp_path / "out", method="rtn", transforms=transforms).manifest
    arrays = stored(tmp_path / "out")
    planned = {d.site.name: d for d in plan.decisions if d.rule}
    for layer in manifest["layers"]:
        own = {n: t for n, t in arrays.items() if n.startswith((f"{layer['name']}.weight_", f"{layer['name']}.input_"))}
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
        assert nbytes == layer["nbytes"] == planned[layer["name"]].nbytes
        assert layer["bits_per_weight"] == 8 * nbytes / (layer["shape"][0] * layer["shape"][1])
        inputs = len([name for name in own if ".input_" in name])
        assert inputs == (len(transforms) if layer["kind"] == "linear" else 0) == len(layer["rewrites"])
        assert layer["transforms"] == (transforms if layer["kind"] == "linear" else [])
    assert plan.bits_per_weight == manifest["bits_per_weight"]
    entry = next(entry for entry in plan.to_json()["layers"] if entry["name"].endswith("0.mlp.up_proj"))
    assert entry["transforms"] == transforms


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
def test_same_bytes_at_any_thread_count(short: Short, hashes: Hashes, tmp_path: Path, method: str) -> None:
    for threads in (1, 3):
        short(tmp_path / str(threads), method=method, threads=threads, transforms=BOTH)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")


class Stop(Exception):
    pass


def test_stopped_after_every_stage_and_continued(short: Short, hashes: Hashes, tmp_path: Path) -> None:
    whole = {"format": "W8A8", "method": "rtn", "transforms": BOTH}
    short(tmp_path / "whole", **whole)
    stops = 0

    def interrupt(event: Event) -> None:
        if event.kind == "block" or event.name.endswith("v_proj"):
            raise Stop

    while not (tmp_path / "out").exists():
        try:
            short(tmp_path / "out", progress=interrupt if stops < 4 else None, **whole)
        except Stop:
            stops += 1
    assert stops == 4
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_other_transforms_are_another_run(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.run import ending

    monkeypatch.setattr(ending, "MOST_KL", -1.0)  # leaves a finished journal behind
    with pytest.raises(QualityError):
        short(tmp_path / "out", method="rtn", transforms=["rotate"])
    with pytest.raises(ResumeError, match="recipe was"):
        short(tmp_path / "out", method="rtn")


def test_signs_follow_the_seed_of_the_run_and_the_name_of_the_layer(short: Short, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    one, again, other = (
        {
            name: tensor.tolist()
            for name, tensor in stored(
                short(tmp_path / name, method="rtn", transforms=["rotate"], seed=seed).path
            ).items()
            if name.endswith(".input_0_signs")
        }
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == again and all(one[name] != other[name] for name in one)
    assert len({tuple(signs) for signs in one.values()}) == len(one) == 14
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transform_decides_whether_text_is_needed(short: Short, tmp_path: Path) -> None:
    assert short(tmp_path / "rotate", method="rtn", transforms=["rotate"]).manifest["calibration"] is None
    manifest = short(tmp_path / "smooth", method="rtn", transforms=["smooth"]).manifest
    assert manifest["calibration"]["tokens"] == 8 * 64
    assert {layer["tokens"] for layer in manifest["layers"] if layer["kind"] == "linear"} == {8 * 64}


def permuted(x: Tensor) -> Tensor:
    return x.flip(0)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (permuted, "other values than those that were fitted"),
        (lambda x: x.float(), "it is torch.float32"),
        (lambda x: x[:-1].contiguous(), "it is torch"),
        (None, r"input_\d_.* is missing"),
    ],
    ids=["permuted", "wider", "shorter", "dropped"],
)
@pytest.mark.parametrize("array", ["input_0_scale", "input_1_signs"])
def test_a_faulty_array_is_caught_when_it_is_read_back(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: str, fault: Any, match: str
) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        hit = {key: value for key, value in tensors.items() if key.endswith(f"down_proj.{array}")}
        rest = {key: value for key, value in tensors.items() if key not in hit}
        return good(path, rest if fault is None else {**rest, **{k: fault(v) for k, v in hit.items()}}, metadata)

    monkeypatch.setattr(stages, "write_safetensors", bad)
    with pytest.raises(VerificationError, match=match):
        short(tmp_path / "out", method="rtn", transforms=BOTH)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "match"), [(float("nan"), "NaN or Inf"), (0.0, "other values")])
def test_a_scale_that_is_no_number_or_zero(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, match: str
) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return good(
            path,
            {k: v.index_fill(0, torch.tensor(1), value) if k.endswith("_scale") and ".input_" in k else v
             for k, v in tensors.items()},
            metadata,
        )  # fmt: skip

    monkeypatch.setattr(stages, "write_safetensors", bad)
    with pytest.raises(VerificationError, match=match):
        short(tmp_path / "out", method="rtn", transforms=["smooth"])


def test_an_array_that_no_layer_names_is_found(short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Solved.arrays

    def more(solved: Solved) -> dict[str, Tensor]:
        arrays = good(solved)
        return arrays | {"input_1_signs": arrays["input_0_signs"]} if "input_0_signs" in arrays else arrays

    monkeypatch.setattr(Solved, "arrays", more)
    with pytest.raises(VerificationError, match=r"listed and stored differ.*1_signs"):
        short(tmp_path / "out", method="rtn", transforms=["rotate"])


def test_what_has_no_inputs_to_rewrite_is_refused_by_the_plan(
    tiny: Path, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    steps = (Step("rotate"),)
    for match, words in (
        ("kind:embedding", "inputs of embedding are not rewritten"),
        ("kind:head", "shares its matrix"),
    ):
        recipe = Recipe((Rule(match, "int8/g64", transforms=steps), *Recipe.simple("int4/g32").rules))
        with pytest.raises(UnsupportedError, match=words):
            fewbit.plan(tiny, recipe)
    mixture = tiny_family("mixtral")
    with pytest.raises(UnsupportedError, match=r"rotate for .*experts.*inputs of experts are not rewritten"):
        fewbit.plan(mixture, "int4/g16", transforms=["rotate"])
    head = Recipe((Rule("kind:head", "int8/g64", transforms=(Step("smooth"),)), *Recipe.simple("int4/g16").rules))
    with pytest.raises(UnsupportedError, match="smooth for lm_head; calibration ends before the head"):
        fewbit.plan(mixture, head)
    with pytest.raises(SpecError, match="a recipe names its own"):
        fewbit.plan(tiny, Recipe.simple("int4/g32"), transforms=["rotate"])


def test_a_head_of_its_own_can_be_rotated(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    rule = Rule("kind:head", "int8/g32", activation="int8/channel/sym", transforms=(Step("rotate"),))
    model = tiny_family("llama")
    result = fewbit.quantize(model, Recipe((rule, *Recipe.simple("int8/g16").rules)), out=tmp_path / "out")
    head = next(layer for layer in result.manifest["layers"] if layer["kind"] == "head")
    assert [rewrite["kind"] for rewrite in head["rewrites"]] == ["rotation"]
    assert result.manifest["check"]["kl_mean"] < 1e-3


@pytest.mark.parametrize(("format", "method"), [("int4/g32", "gptq"), ("vector4x4+3", "vptq")])
def test_a_second_moment_of_few_tokens_is_told_and_what_it_took(format: str, method: str) -> None:
    site = Site("up", "linear", "up.weight", (64, 32), 1, 0, None)
    draw = torch.Generator().manual_seed(0)
    weight, few, many = (torch.randn(count, 32, generator=draw) for count in (64, 16, 64))
    twice = many[:, torch.arange(32) // 2]  # every input is another's copy: enough tokens, and no full rank
    damped, counted = "damping raised from 0 to 0.001", "second moment of 16 tokens for 32 columns"
    for x, damping, expected in (
        (many, 0.0, ""),
        (many, 0.01, ""),
        (twice, 0.0, damped),
        (few, 0.01, counted),
        (few, 0.0, f"{counted}; {damped}"),
    ):
        rule = Rule("*", format, method, {"damp_percent": damping})
        task = Task(site, rule, fewbit.formats.parse(format), weight, [Facts.of(x, gram=True)], [x], 5)
        assert solve(task).record["note"] == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [("gptq", "3 of 32 inputs always zero"), ("clip", "3 of 32 inputs always zero"), ("rtn", "")],
)
def test_inputs_that_were_always_zero_are_told_where_calibration_decides(method: str, expected: str) -> None:
    site = Site("up", "linear", "up.weight", (4, 32), 1, 0, None)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    rule, format = Rule("*", "int4/g32", method), fewbit.formats.parse("int4/g32")
    for silent, note in (([], ""), ([0, 5, 31], expected)):
        x[:, silent] = 0
        task = Task(site, rule, format, x[:4].clone(), [Facts.of(x, gram=True)], [x], 5)
        assert solve(task).record["note"] == note


def test_a_grid_of_few_tokens_is_told() -> None:
    site = Site("up", "linear", "up.weight", (4, 32), 1, 0, None)
    rule, format = Rule("*", "int8/channel", activation="int8/static"), fewbit.formats.parse("int8/channel")
    for tokens, expected in ((2, "range of 2 tokens for 256 codes"), (256, "")):
        x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
        assert solve(Task(site, rule, format, x[:1].expand(4, 32), [Facts.of(x)], [x], 5)).record["note"] == expected


def test_a_layer_that_no_token_reached_is_named() -> None:
    site = Site("up", "linear", "up.weight", (4, 32), 1, 0, None)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rule = Rule("*", "int8/g32", "gptq", transforms=(Step("smooth"), Step("rotate")))
    format = fewbit.formats.parse("int8/g32")
    done = solve(Task(site, rule, format, weight, [Facts.none(32, gram=True)], [torch.zeros(0, 32)], 5))
    expected = "no calibration token reached it: smooth left the inputs as they are, rounded to nearest instead of gptq"
    assert done.record["note"] == expected
    assert bool(done.rewrite.arrays["0_scale"].eq(1).all())
    assert done.record["relative_error"] < 0.01, "it is that of the effective weight"


def test_the_error_of_a_layer_is_at_its_output_on_inputs_as_they_are() -> None:
    site = Site("up", "linear", "up.weight", (6, 32), 1, 0, None)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 32, generator=generator), torch.randn(99, 32, generator=generator)
    rule = Rule("*", "int4/g32", "gptq", transforms=(Step("smooth"), Step("rotate")))
    format = fewbit.formats.parse("int4/g32")
    done = solve(Task(site, rule, format, weight, [Facts.of(x, gram=True)], [x], 5))
    y, kept = x.double() @ weight.double().T, done.rewrite.apply(x).double() @ done.qtensor.dequantize().double().T
    assert abs(done.record["relative_error"] - float((y - kept).norm() / y.norm())) < 1e-6


def test_the_method_sees_the_rewritten_weight_and_facts() -> None:
    site = Site("up", "linear", "up.weight", (6, 32), 1, 0, None)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 32, generator=generator), torch.randn(99, 32, generator=generator)
    rule = Rule("*", "int4/g32", "gptq", transforms=(Step("smooth"), Step("rotate")))
    format, facts = fewbit.formats.parse("int4/g32"), Facts.of(x * torch.logspace(-1, 1, 32), gram=True)
    done = solve(Task(site, rule, format, weight, [facts], [x], 5))
    one = fewbit.transforms.smooth(weight, facts)
    two = fewbit.transforms.rotate(weight, None, fewbit.transforms.seed_of(5, "up") ^ 1)
    chain = Chain((one, two))
    assert all(torch.equal(array, chain.arrays[name]) for name, array in done.rewrite.arrays.items())
    expected = fewbit.methods.gptq(chain.weight(weight), format, chain.facts(facts))
    assert torch.equal(done.qtensor.dequantize(), expected.dequantize())


@pytest.mark.parametrize("method", ["awq", "hqq"])
def test_scales_are_searched_for_the_format_of_the_rule(method: str) -> None:
    site = Site("a", "linear", "a.weight", (6, 32), 1, 0, None)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 32, generator=generator), torch.randn(99, 32, generator=generator)
    facts = Facts.of(x * torch.logspace(-1, 1, 32), gram=True)
    found = []
    for name in ("int2/g32/min", "int4/g8/min"):
        rule, format = Rule("*", name, method, transforms=(Step("awq"),)), fewbit.formats.parse(name)
        done = solve(Task(site, rule, format, weight, [facts], [x], 5))
        scale = fewbit.transforms.awq(weight, facts, 0, format)
        assert torch.equal(done.rewrite.arrays["0_scale"], scale.scale)
        chosen = fewbit.methods.named(method)(scale.weight(weight), format, scale.facts(facts))
        assert torch.equal(done.qtensor.dequantize(), chosen.dequantize())
        found.append(scale.scale)
    assert not torch.equal(*found)


@pytest.mark.parametrize(("format", "method"), [("int4/g32/asym", "awq"), ("int4/g32/min", "hqq")])
def test_methods_run_end_to_end_on_scaled_inputs(short: Short, tmp_path: Path, format: str, method: str) -> None:
    manifest = short(tmp_path / "out", format, method=method, transforms=["awq"]).manifest
    layers = [layer for layer in manifest["layers"] if layer["kind"] == "linear"]
    assert layers and {(layer["method"], layer["note"]) for layer in layers} == {(method, "")}
    assert all([step["kind"] for step in layer["rewrites"]] == ["scale"] for layer in layers)
    assert max(layer["relative_error"] for layer in layers) < 0.2


def test_the_check_of_a_run_is_what_the_loaded_model_does(
    tiny: Path, tmp_path: Path, probe_kl: Callable[[Any], float]
) -> None:
    """The run propagates what will run: inputs rewritten, then rounded (coarsely, so that the order shows)."""

    every = Rule("*", "int8/channel/sym", "rtn", activation="int3/channel/sym", transforms=tuple(map(Step, BOTH)))
    recipe = Recipe((Rule("kind:embedding", "float"), Rule("kind:head", "float"), every))
    result = fewbit.quantize(tiny, recipe, out=tmp_path / "out", samples=8, context=64)
    # the run keeps the original's logits in float16; a code on the edge may fall to either side of a kernel's rounding
    assert abs(probe_kl(fewbit.load(tmp_path / "out")) / result.manifest["check"]["kl_mean"] - 1) < 0.02
