# SPDX-License-Identifier: Apache-2.0
"""Static grids from facts: of what layers see in the float model, by any observer, and refused where unknown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import formats
from fewbit.calibrate import Text
from fewbit.containers.files import digest, read_json, write_json
from fewbit.containers.safetensors import open_safetensors, write_safetensors
from fewbit.core.observers import NAMES
from fewbit.errors import CorruptFileError, InputError, SpecError
from fewbit.formats.fixed import Fixed
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.recipe import ModelStep, Recipe, Rule, Step
from fewbit.run import opening
from fewbit.run.collecting import merge
from fewbit.run.facts import KeptFacts, inputs_file

FEW: dict[str, Any] = {"samples": 6, "context": 32, "calibration_dtype": "float32"}
FLOATS = (Rule("kind:embedding", "float"), Rule("kind:head", "float"))


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> KeptFacts:
    """Ranges of a few windows, and nothing that takes long."""
    return fewbit.collect(tiny, out=tmp_path_factory.mktemp("ranges") / "facts", **FEW, gram=False, fisher=False)


def static(activation: str, *steps: str, **more: Any) -> Recipe:
    return Recipe(
        (*FLOATS, Rule("*", "int8/channel", activation=activation, transforms=tuple(map(Step, steps)))), **more
    )


@pytest.mark.parametrize("observer", NAMES)
def test_every_observer_fixes_grids_from_one_calibration(
    tiny: Path, kept: KeptFacts, tmp_path: Path, observer: str
) -> None:
    asked = formats.parse(f"int8/static/asym/{observer}")
    assert isinstance(asked, Fixed)
    result = fewbit.quantize(tiny, static(asked.name), out=tmp_path / "out", facts=kept.path, **FEW)
    model, found = StreamedModel.open(open_checkpoint(tiny)), 0
    for layer in result.manifest["layers"]:
        if layer["block"] is not None:
            assert layer["activation"] == asked.observed(kept.ranges(model.site(layer["name"]))).name
            found += 1
    assert found == 14 and result.manifest["check"]["kl_mean"] < 0.05


def test_the_first_group_has_the_grid_that_a_run_on_the_text_gives_it(
    tiny: Path, kept: KeptFacts, tmp_path: Path
) -> None:
    """Nothing before it is quantized but the embedding, which stays in float here."""
    made = [
        fewbit.quantize(tiny, static("int8/static/asym/mse"), out=tmp_path / name, **FEW, **more).manifest["layers"]
        for name, more in (("text", {}), ("facts", {"facts": kept.path}))
    ]
    own, of_facts = ({layer["name"]: layer["activation"] for layer in layers} for layers in made)
    alike = {name for name, grid in own.items() if of_facts[name] == grid}
    assert {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"} <= alike and len(alike) < len(own)


def test_options_of_observers_reach_grids_and_the_manifest(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    grids, found = {}, formats.parse("int8/static/sym/percentile95")
    for name in ("int8/static/sym/percentile95", "int8/static/sym/percentile"):
        out, few = tmp_path / name.rpartition("/")[2], {**FEW, "facts": kept.path, "head": "float"}
        result = fewbit.quantize(tiny, "int8/channel", activation=name, out=out, **few)
        assert result.manifest["recipe"]["rule"][-1]["activation"] == name
        grids[name] = {layer["name"]: layer["activation"] for layer in result.manifest["layers"]}
    model = StreamedModel.open(open_checkpoint(tiny))
    for name, grid in grids["int8/static/sym/percentile95"].items():
        assert isinstance(found, Fixed) and grid == found.observed(kept.ranges(model.site(name))).name
    assert grids["int8/static/sym/percentile95"] != grids["int8/static/sym/percentile"]


def test_the_plan_tells_the_grids_of_the_run(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    """By rules of several kinds: those without static grids stay as they are, and a known grid what it is."""
    known, open_ = "int8/static/sym/s0.05", "int8/static/asym/percentile"
    rules = (Rule("*.up_proj", "int8/channel"), Rule("*.down_proj", "int8/channel", activation=known))
    recipe = Recipe((*FLOATS, *rules, Rule("*", "int8/channel", activation=open_)))
    planned = fewbit.plan(tiny, recipe, facts=kept.path)
    assert planned.size_bytes == fewbit.plan(tiny, recipe).size_bytes
    told = {one["name"]: one["activation"] for one in planned.to_json()["layers"] if one["method"]}
    made = fewbit.quantize(tiny, recipe, out=tmp_path / "out", facts=kept.path, **FEW).manifest["layers"]
    assert told == {layer["name"]: layer["activation"] for layer in made}
    assert {None, known} < set(told.values()) and open_ not in told.values()


def test_a_plan_from_facts_has_no_calibration_to_run(tiny: Path, kept: KeptFacts) -> None:
    """100,000 windows would take minutes, and take none where facts are there instead."""
    text, facts = (fewbit.plan(tiny, static("int8/static"), samples=100_000, **m) for m in ({}, {"facts": kept.path}))
    assert facts.seconds < 60 < text.seconds


def test_a_scheme_and_an_activation_are_one_too_many(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"scheme rounds activations to int8/channel/sym; format int8/channel/sym with"):
        fewbit.quantize(tiny, "W8A8", activation="int8/g64", out=tmp_path / "out")
    with pytest.raises(SpecError, match=r"'percent' .*out of range|percent = 3.0 of observer percentile; out of range"):
        fewbit.quantize(tiny, "int8/channel", activation="int8/static/percentile3", out=tmp_path / "out")
    with pytest.raises(SpecError, match="activation beside a Recipe"):
        fewbit.quantize(tiny, static("int8/channel"), activation="int8/g64", out=tmp_path / "out")


def test_merged_facts_fix_the_grids_of_both_texts(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    more = fewbit.collect(tiny, out=tmp_path / "more", **FEW, seed=7, gram=False, fisher=False)
    both = merge([kept.path, more.path], out=tmp_path / "both")
    site = next(site for site in StreamedModel.open(open_checkpoint(tiny)).sites if site.block == 1)
    asked = formats.parse("int8/static/asym/percentile")
    assert isinstance(asked, Fixed)
    result = fewbit.quantize(tiny, static(asked.name), out=tmp_path / "out", facts=both.path, **FEW)
    layer = next(layer for layer in result.manifest["layers"] if layer["name"] == site.name)
    assert layer["activation"] == asked.observed(kept.ranges(site).merge(more.ranges(site))).name
    blind = fewbit.collect(tiny, out=tmp_path / "blind", **FEW, seed=3, gram=False, fisher=False, ranges=False)
    assert merge([kept.path, blind.path], out=tmp_path / "half").described["collected"] == ["mean_square"]


@pytest.mark.parametrize(
    "recipe, match",
    [
        (
            static("int8/static", "smooth"),
            "grid of int8/static for .*q_proj.* smooth rewrites its inputs.*--calibration TEXT and no --facts,.*"
            "int8/static/asym/minmax from these facts, or int8/channel, which needs no range",
        ),
        (
            static("int4/static/sym/minmax", "smooth", "rotate"),
            "; rotate rewrites.*--calibration TEXT and no --facts, .* will be, or int4/channel, which needs no range",
        ),
        (static("int8/static/asym/minmax", "hadamard"), "hadamard rewrites its inputs.*nothing of what these mix to"),
        (
            static("int8/static", model=ModelStep("quarot")),
            "quarot changes what its layers see.*--calibration TEXT and no --facts.*leave out quarot",
        ),
        (static("int8/channel", model=ModelStep("spinquant")), "spinquant from facts.*no text to learn from"),
        (Recipe((*FLOATS, Rule("*", "int4/g32", "gptq")), ModelStep("quarot")), "method gptq .*quarot changes"),
    ],
)
def test_what_facts_cannot_tell_is_refused_before_any_work(
    tiny: Path, kept: KeptFacts, tmp_path: Path, recipe: Recipe, match: str
) -> None:
    with pytest.raises(SpecError, match=match):
        fewbit.quantize(tiny, recipe, out=tmp_path / "out", facts=kept.path, **FEW)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SpecError, match=match):
        fewbit.plan(tiny, recipe, facts=kept.path)
    fewbit.plan(tiny, recipe)


@pytest.mark.parametrize("symmetric", ["asym", "sym"])
def test_extremes_behind_a_scale_of_every_channel_are_those_of_the_scaled_inputs(
    tiny: Path, kept: KeptFacts, tmp_path: Path, symmetric: str
) -> None:
    """Of the layers that see what they see in the float model, bit for bit those of a run on the text; and of all, what
    the float model shows, scaled by what is stored, but for the order of sums in its products."""
    recipe, known = static(f"int8/static/{symmetric}/minmax", "smooth"), {}
    for name, more in (("text", {}), ("facts", {"facts": kept.path})):
        made = fewbit.quantize(tiny, recipe, out=tmp_path / name, **FEW, **more).manifest["layers"]
        known[name] = {layer["name"]: formats.parse(layer["activation"]) for layer in made}
    assert all(known["text"][f"model.layers.0.self_attn.{part}_proj"] == of for part, of in _attention(known["facts"]))
    checkpoint, quantized = open_checkpoint(tiny), fewbit.load(tmp_path / "facts")
    ids = opening.draw(checkpoint, checkpoint.words(), Text(FEW["samples"], FEW["context"]), 0, opening.silent).ids
    floating, seen = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), {}
    for name in known["facts"]:

        def look(module: Any, given: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] = given[0] * quantized.get_submodule(name).input_0_scale.float()

        floating.get_submodule(name).register_forward_pre_hook(look)
    with torch.no_grad():
        floating(ids)
    for name, grid in known["facts"].items():
        wanted = grid.at(float(seen[name].min()), float(seen[name].max()))
        assert grid.scale == pytest.approx(wanted.scale, rel=1e-4) and abs(grid.zero - wanted.zero) <= 1
    assert len(seen) == 14 and len({grid.name for grid in known["facts"].values()}) > 7


def _attention(grids: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(part, grids[f"model.layers.0.self_attn.{part}_proj"]) for part in "qkv"]


def test_facts_of_versions_without_extremes_are_refused_behind_scales_and_serve_all_else(
    tiny: Path, kept: KeptFacts, tmp_path: Path
) -> None:
    before = copied(kept, tmp_path / "before", lambda name: not name.endswith(".ends"))
    for ask in (fewbit.plan, partial(fewbit.quantize, out=tmp_path / "out", **FEW)):
        with pytest.raises(InputError, match=r"extremes of the inputs of .*q_proj.*; collect them again"):
            ask(tiny, static("int8/static/asym/minmax", "smooth"), facts=before.path)
    assert not (tmp_path / "out").exists()
    fewbit.plan(tiny, static("int8/static/asym/minmax"), facts=before.path)


def copied(kept: KeptFacts, folder: Path, keep: Callable[[str], bool]) -> KeptFacts:
    """``kept`` without the arrays that are not to ``keep``."""
    folder.mkdir()
    described = read_json(kept.path / "facts.json")
    for name in described["files"]:
        file = open_safetensors(kept.path / name)
        write_safetensors(folder / name, {key: file.get(key) for key in file.entries if keep(key)}, file.metadata)
    write_json(folder / "facts.json", {**described, "files": {n: digest(folder / n) for n in described["files"]}})
    return KeptFacts.read(folder)


def test_facts_without_ranges_are_refused_and_serve_all_else(tiny: Path, tmp_path: Path) -> None:
    """So are facts of versions that kept none."""
    some = fewbit.collect(tiny, out=tmp_path / "some", **FEW, gram=False, fisher=False, ranges=False)
    with pytest.raises(
        InputError, match=r"ranges of .*q_proj.* it was not collected; collect again without --no-ranges"
    ):
        fewbit.quantize(tiny, "W8A8_STATIC", out=tmp_path / "out", facts=some.path, **FEW)
    with pytest.raises(InputError, match="it was not collected; collect again without --no-ranges"):
        fewbit.plan(tiny, "W8A8_STATIC", facts=some.path)
    assert not (tmp_path / "out").exists()
    fewbit.quantize(tiny, "int4/g32", method="clip", out=tmp_path / "out", facts=some.path, **FEW)


@pytest.mark.parametrize("damage", ["counts", "ends", "negative", "missing"])
def test_damaged_histograms_are_found(tiny: Path, kept: KeptFacts, tmp_path: Path, damage: str) -> None:
    path = inputs_file(kept.path, 0)
    file = open_safetensors(path)
    tensors = {name: file.get(name) for name in file.entries}
    counts, ends = (next(n for n in tensors if n.endswith(what)) for what in (".range_counts", ".range_ends"))
    if damage == "counts":
        tensors[counts] = tensors[counts][1:].clone()
    elif damage == "negative":
        tensors[counts][3] = -1
    elif damage == "ends":
        tensors[ends][0, 1] = torch.nan
    else:
        del tensors[ends]
    folder = tmp_path / "facts"
    folder.mkdir()
    for other in kept.path.iterdir():
        (folder / other.name).write_bytes(other.read_bytes())
    write_safetensors(inputs_file(folder, 0), tensors, file.metadata)
    described = read_json(folder / "facts.json")
    described["files"][path.name] = digest(inputs_file(folder, 0))
    write_json(folder / "facts.json", described)
    site = StreamedModel.open(open_checkpoint(tiny)).site(counts.removesuffix(".range_counts"))
    with pytest.raises(CorruptFileError, match=r"range_counts|range_ends"):
        KeptFacts.read(folder).ranges(site)
