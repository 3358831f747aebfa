# SPDX-License-Identifier: Apache-2.0
"""Methods of about one bit through the whole pipeline: planned, solved, tuned, written, read back, loaded, run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.containers.safetensors import open_safetensors
from fewbit.core.terms import Columns, Product, Terms
from fewbit.errors import UnsupportedError
from fewbit.run import sequential
from fewbit.run.events import Event
from fewbit.run.rewriting import as_run

Short = Callable[..., Any]
FEW: dict[str, Any] = {"calibration_dtype": "float32", "samples": 4, "context": 32, "force": True}
LOSS = {"name": "scales", "iters": 6, "batch": 4, "lr": 0.02, "relative": 0.5, "cosine": 0.7, "own": 0.4}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ptq161": ("int1/channel/min", "ptq161", {"tune": [LOSS]}),
    "billm": ("sign/g32", "billm", {}),
    "arb": ("sign/channel", "arb", {}),
    "laq": (
        "int3/g8/asym",
        "laq",
        {"options": {"mean_bits": 5.9, "widths": "2,3,4"}, "tune": [{"name": "scales", "iters": 4, "batch": 4}]},
    ),
    "vptq": (
        "vector4x4+3",
        "vptq",
        {
            "options": {
                "outliers": 0.1,
                "outlier_bits": 4,
                "outlier_residual_bits": 2,
                "norm": "both",
                "restarts": 1,
                "rounds": 1,
            },
            "tune": [{"name": "vectors", "iters": 4, "batch": 4}, {"name": "books", "iters": 4, "batch": 4}],
        },
    ),
    "nanoquant": ("sign/channel", "nanoquant", {"options": {"bits": 1.4, "iterations": 4, "rounds": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_stored_and_the_loaded_model_is_what_was_checked(
    case: str, tiny: Path, short: Short, tmp_path: Path, probe_kl: Callable[[Any], float]
) -> None:

    format, method, more = CASES[case]
    plan = fewbit.plan(tiny, format, method=method, force=True, **more)
    out = tmp_path / "out"
    manifest = short(out, format, method, **FEW, **more).manifest
    planned = {d.site.name: (d.nbytes, d.kernel) for d in plan.decisions if d.rule is not None}
    made = {layer["name"]: (layer["nbytes"], layer["kernel"]) for layer in manifest["layers"]}
    if case == "laq":  # widths, and so kernels, are the weights' to choose
        assert {name: size for name, (size, _) in made.items()} == {name: size for name, (size, _) in planned.items()}
    else:
        assert made == planned
    sums = [layer for layer in manifest["layers"] if "terms" in layer]
    assert len(sums) == 14
    stored = sum(
        entry.nbytes
        for path in out.glob("*.safetensors")
        for name, entry in open_safetensors(path).entries.items()
        if ".weight_" in name
    )
    assert stored == sum(layer["nbytes"] for layer in manifest["layers"])
    model = fewbit.load(out)
    weight = model.model.layers[0].mlp.down_proj.prepared.weight()
    assert isinstance(weight, Terms)
    assert isinstance(weight.terms[0], Product if case == "nanoquant" else Columns) or case == "arb"
    assert abs(probe_kl(model) / manifest["check"]["kl_mean"] - 1) < 0.02


def test_the_loss_is_of_both_targets_in_both_measures(
    tmp_path: Path, short: Short, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss told before any step, worked out from the files and the block as the pipeline runs it."""
    expected: list[float] = []
    told: list[tuple[float, float]] = []
    good, before = sequential.tune_block, sequential.reference_on
    floats: dict[int, list[torch.Tensor]] = {}

    def float_block(run: Any, stage: int, index: int) -> None:
        source = run.hidden(stage - 1, "calibration")
        batches = range(len(run.texts.batches))
        floats[index] = [run.model.run_block(index, source.read(i), run.inputs("calibration")) for i in batches]
        before(run, stage, index)

    def block(run: Any, stage: int, index: int, solved: Any) -> Any:
        source, after = run.hidden(stage - 1, "calibration"), run.hidden(stage, "reference")
        batches = range(len(run.texts.batches))
        with as_run(run.model, solved):
            made = torch.cat([run.model.run_block(index, source.read(i), run.inputs("calibration")) for i in batches])
        first, own = torch.cat([after.read(i) for i in batches]).double(), torch.cat(floats[index]).double()
        total = power = 0.0
        for share, wanted in ((1.0, first), (LOSS["own"], own)):
            error, size = made.double() - wanted, wanted.square().mean(-1)
            cosine = (made.double() * wanted).sum(-1) / (made.double().norm(dim=-1) * wanted.norm(dim=-1))
            lost = (error.square().mean(-1) / size ** LOSS["relative"]).mean() - LOSS["cosine"] * cosine.log().mean()  # type: ignore[operator]
            total += float(share) * float(lost)  # type: ignore[arg-type]
            power = power or float((size ** (1 - LOSS["relative"])).mean())  # type: ignore[operator]
        expected.append((total / power) ** 0.5)
        return good(run, stage, index, solved)

    def listen(event: Event) -> None:
        if found := re.search(r"root of the loss ([\d.]+)% -> ([\d.]+)%", event.message):
            told.append((float(found[1]) / 100, float(found[2]) / 100))

    monkeypatch.setattr(sequential, "reference_on", float_block)
    monkeypatch.setattr(sequential, "tune_block", block)
    short(tmp_path / "out", "int1/channel/min", "ptq161", tune=[LOSS], progress=listen, **FEW)
    assert len(told) == 2
    assert [start for start, _ in told] == pytest.approx(expected, rel=2e-3)  # told with few digits
    assert all(end < start for start, end in told)


def test_what_cannot_be_a_sum_or_be_chosen_is_refused_in_the_plan(
    tiny: Path, tiny_family: Callable[[str], Path]
) -> None:
    for format, method, match in (
        ("int2/g64/min", "ptq161", "two values anywhere"),
        ("int1/g64/asym", "billm", "not signs"),
        ("ternary/g64", "arb", "not signs"),
        ("sign/g64", "nanoquant", "more than one scale a row"),
    ):
        with pytest.raises(UnsupportedError, match=match):
            fewbit.plan(tiny, format, method=method, force=True)
    with pytest.raises(UnsupportedError, match=r"rounding tunes layers that are one matrix|no offset|evenly"):
        fewbit.plan(tiny, "int1/channel/min", method="ptq161", tune=["rounding"], force=True)
    with pytest.raises(UnsupportedError, match="fused experts"):
        fewbit.plan(tiny_family("mixtral"), "sign/channel", method="arb", force=True)
