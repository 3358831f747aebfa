# SPDX-License-Identifier: Apache-2.0
"""Recipes within a budget: true bits, the harms they rest on, measured divergence, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import calibrate, formats, methods
from fewbit.errors import FewbitError, InputError, SpecError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe, Rule
from fewbit.run.facts import KeptFacts
from fewbit.search import Allocation

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, CONTEXT = 6, 32
CANDIDATES = ("int2/g32/asym", "int4/g32/asym", "int8/channel", "int3/g32/asym:rtn")
FEW: dict[str, Any] = {"candidates": CANDIDATES, "method": "clip", "threads": 1}
TEXT: dict[str, Any] = {"by": "kl", "samples": 2, "context": 24, "seed": 1}


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> KeptFacts:
    out, few = tmp_path_factory.mktemp("facts") / "facts", {"samples": SAMPLES, "context": CONTEXT}
    return fewbit.collect(tiny, out=out, **few, calibration_dtype="float32")


@pytest.fixture(scope="module")
def measured(tiny: Path, kept: KeptFacts) -> Allocation:
    return fewbit.allocate(tiny, 3.7, facts=kept.path, **FEW, **TEXT)


def divergence(folder: Path, changed: dict[str, torch.Tensor]) -> float:
    """Mean KL of transformers' model with ``changed`` weights, in float64 sums, on the windows of TEXT."""
    words = open_checkpoint(folder).tokenizer()
    ids = calibrate.calibration(words, None, TEXT["samples"], TEXT["context"], TEXT["seed"]).ids
    logits = []
    for weights in ({}, changed):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, values in weights.items():
            model.get_submodule(name).weight.data = values
        with torch.no_grad():
            logits.append(model(ids).logits[:, :-1].double().log_softmax(-1))
    p, q = logits
    return float((p.exp() * (p - q)).sum(-1).mean())


def solved(folder: Path, kept: KeptFacts, name: str, candidate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, what the method makes of it)."""
    model = StreamedModel.open(open_checkpoint(folder))
    model.load("")
    known, weight = kept.of(model.site(name)), model.weight(name).float()
    assert known is not None
    format, _, method = candidate.partition(":")
    return weight, methods.named(method)(weight, formats.parse(format), known[0]).dequantize()


@pytest.mark.parametrize("budget", [2.8, 4.5])
def test_a_recipe_takes_the_bits_that_were_promised(tiny: Path, kept: KeptFacts, budget: float) -> None:
    found = fewbit.allocate(tiny, budget, facts=kept.path, **FEW)
    assert Recipe.from_dict(found.recipe.to_dict()) == found.recipe
    planned = fewbit.plan(tiny, found.recipe)
    decisions = [decision for decision in planned.decisions if decision.site.block is not None]
    weights = sum(decision.weights for decision in decisions)
    assert 8 * sum(decision.nbytes for decision in decisions) / weights == pytest.approx(found.bits)
    assert budget - 0.3 < found.bits <= budget
    chosen = {row.name: row.candidate for row in found.layers}
    assert {f"{d.rule.format}:{d.rule.method}" for d in decisions if d.rule} == set(chosen.values())
    assert all(d.rule and chosen[d.site.name] == f"{d.rule.format}:{d.rule.method}" for d in decisions)
    assert found.bound is not None and found.bound <= found.expected
    cheaper = [row for row in found.uniform if row.bits <= budget]
    assert cheaper and all(found.expected <= row.expected for row in cheaper)
    assert found.expected == pytest.approx(sum(row.harm for row in found.layers))


def test_a_run_writes_that_many_bits(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    found = fewbit.allocate(tiny, 3.9, facts=kept.path, unit="block", by="fisher", **FEW)
    assert all(len({row.candidate for row in found.layers if f"layers.{i}." in row.name}) == 1 for i in range(2))
    made = fewbit.quantize(tiny, found.recipe, out=tmp_path / "out", facts=kept.path).manifest["layers"]
    layers = [layer for layer in made if layer["block"] is not None]
    written = 8 * sum(layer["nbytes"] for layer in layers) / sum(row.weights for row in found.layers)
    assert len(layers) == 14 and written == pytest.approx(found.bits)


def test_harms_are_of_what_the_method_makes_of_a_layer(tiny: Path, kept: KeptFacts) -> None:
    """One candidate for all, so that nothing else can have been chosen."""
    format, site = "int4/g32/asym", StreamedModel.open(open_checkpoint(tiny)).site("model.layers.1.mlp.up_proj")
    weight, values = solved(tiny, kept, site.name, f"{format}:clip")
    facts, fisher = kept.of(site), kept.fisher(site)
    assert facts is not None and fisher is not None
    d, f, gram = (weight - values).double(), fisher[0].double(), facts[0].gram.double()
    rows = kept.output_square(site)[0].double() / (SAMPLES * CONTEXT)  # type: ignore[index]
    expected = {"fisher": (d.square() * f).sum(), "output": ((d @ gram * d).sum(1) * rows).sum()}
    for by, total in expected.items():
        one = {"candidates": [format], "method": "clip", "by": by, "threads": 1}
        found = fewbit.allocate(tiny, 4.625, facts=kept.path, **one)  # 16 + 4 bits a group
        harm = next(row.harm for row in found.layers if row.name == site.name)
        assert harm == pytest.approx(CONTEXT / (2 * SAMPLES) * float(total), rel=1e-4)


def test_palettes_and_vectors_stand_beside_integers(tiny: Path, kept: KeptFacts) -> None:
    """Their tables and books are in the budget, and their harm is that of what their own methods make."""
    others = ["palette3/row:skm", "palette2/row:gptq", "vector2x4:vptq"]
    found = fewbit.allocate(tiny, 3.4, facts=kept.path, candidates=["int4/g32/asym", *others], method="clip", threads=1)
    chosen = {row.name: row.candidate for row in found.layers}
    assert len({candidate.partition("/")[0] for candidate in chosen.values()}) > 1 and found.bits <= 3.4
    planned = fewbit.plan(tiny, found.recipe)
    decisions = [decision for decision in planned.decisions if decision.site.block is not None]
    assert 8 * sum(d.nbytes for d in decisions) / sum(d.weights for d in decisions) == pytest.approx(found.bits)
    site = StreamedModel.open(open_checkpoint(tiny)).site("model.layers.1.mlp.up_proj")
    rows, columns = site.shape
    for candidate, bits in ((others[0], 3 + 8 * 16 / columns), (others[2], 2 + 16 * 2 * 16 / (rows * columns))):
        one = fewbit.allocate(tiny, 8, facts=kept.path, candidates=[candidate, "int8/channel:rtn"], threads=1)
        row = next(row for row in one.uniform if row.candidate == candidate)
        assert row.bits == pytest.approx(bits, rel=0.3) and row.expected > 0


def test_estimates_can_be_those_of_a_cheaper_method(tiny: Path, kept: KeptFacts) -> None:
    cheap = fewbit.allocate(tiny, 4.0, facts=kept.path, **{**FEW, "method": "gptq"}, estimate="clip")
    own = fewbit.allocate(tiny, 4.0, facts=kept.path, **FEW)
    assert [row.expected for row in cheap.uniform][:3] == [row.expected for row in own.uniform][:3]
    assert {row.candidate.partition(":")[2] for row in cheap.layers} <= {"gptq", "rtn"}


def test_divergence_is_that_of_the_model_with_these_layers_changed(
    tiny: Path, kept: KeptFacts, measured: Allocation
) -> None:
    names = [row.name for row in measured.layers]
    whole = {name: solved(tiny, kept, name, "int2/g32/asym:clip")[1] for name in names}
    assert measured.uniform[0].measured == pytest.approx(divergence(tiny, whole), rel=1e-3, abs=2e-7)
    alone = sum(divergence(tiny, {name: values}) for name, values in whole.items())
    assert measured.uniform[0].expected == pytest.approx(alone, rel=1e-3, abs=2e-6)
    assert measured.bits <= 3.7 and measured.bound is None
    chosen = {row.name: solved(tiny, kept, row.name, row.candidate)[1] for row in measured.layers}
    assert len({row.candidate for row in measured.layers}) > 1
    assert measured.measured == pytest.approx(divergence(tiny, chosen), rel=1e-3, abs=2e-7)


def test_more_rounds_are_never_worse(tiny: Path, kept: KeptFacts, measured: Allocation) -> None:
    once = fewbit.allocate(tiny, 3.7, facts=kept.path, rounds=1, **FEW, **TEXT)
    assert once.measured is not None and measured.measured is not None
    assert measured.measured <= once.measured
    assert once.uniform == measured.uniform
    fitting = [row.measured for row in once.uniform if row.bits <= 3.7]
    assert len(fitting) == 2 and once.measured <= min(fitting)  # type: ignore[type-var]


def test_what_cannot_be_is_refused_before_any_work(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    def refused(match: str, budget: float = 4.0, kind: type[FewbitError] = SpecError, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            fewbit.allocate(more.pop("model", tiny), budget, facts=more.pop("facts", kept.path), **{**FEW, **more})

    refused(r"budget of 2.1 bits.*take 2\.\d+ to 8\.\d+ true bits", 2.1)
    refused(r"budget of 9 bits.*take 2\.\d+ to 8\.\d+ true bits", 9)
    refused("was not understood", candidates=["int9/g64"])
    refused("method 'gtpq'", candidates=["int4/g32:gtpq"])
    refused("not known from the weight alone", candidates=["W8A8"])
    refused("named twice", candidates=["int4/g32/asym", "INT4/g32/asym"])
    refused("no candidate is named", candidates=[])
    refused("by='hessian'", by="hessian")
    refused("measured on what a run makes", by="kl", estimate="clip")
    refused("below 3 bits rounding without data", candidates=["int2/g32/asym", "int8/channel"], method="rtn")
    other = tmp_path / "model"
    shutil.copytree(tiny, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (other / "model.safetensors").write_bytes(bytes(content))
    refused("the hash of their model's weights is", kind=InputError, model=other)
    few = {"samples": SAMPLES, "context": CONTEXT}
    some = fewbit.collect(tiny, out=tmp_path / "some", fisher=False, **few)
    refused("fisher of .*q_proj.*was not collected", kind=InputError, facts=some.path)


def test_the_command_writes_a_recipe_that_the_others_read(tiny: Path, kept: KeptFacts, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fewbit.cli import app

    out, run = tmp_path / "recipe.toml", CliRunner().invoke
    chosen = [part for text in CANDIDATES for part in ("--candidate", text)]
    call = ["allocate", str(tiny), "--budget", "3.9", "--facts", str(kept.path), "-m", "clip", *chosen, "-o", str(out)]
    result = run(app, call, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    assert "allocated" in result.stdout and "mlp.down_proj" in result.stdout and "int2/g32/asym:clip" in result.stdout
    assert "14/14" in result.stderr and "left" in result.stderr
    expected = fewbit.allocate(tiny, 3.9, facts=kept.path, **FEW).recipe
    assert Recipe.read(out) == expected and isinstance(expected.rules[-1], Rule)
    assert run(app, ["plan", str(tiny), "--recipe", str(out)]).exit_code == 0
    again = run(app, call)
    assert again.exit_code == 3 and "exists already" in again.stderr
