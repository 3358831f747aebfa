# SPDX-License-Identifier: Apache-2.0
"""Vectors of codebooks through the whole pipeline: planned, solved, learned on the block's output, written, run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.errors import SpecError, UnsupportedError
from fewbit.recipe import Recipe, Rule
from fewbit.run.events import Event

Short = Callable[..., Any]
FORMAT = "vector4x4+4"
FEW: dict[str, Any] = {"samples": 4, "context": 32, "calibration_dtype": "float32"}
STEPS = {"iters": 8, "batch": 4}


def test_learned_vectors_are_stored_and_run(tmp_path: Path, short: Short, probe_kl: Callable[[Any], float]) -> None:
    told: list[tuple[float, float]] = []

    def note(event: Event) -> None:
        if found := re.search(r"output error ([\d.]+)% -> ([\d.]+)%", event.message):
            told.append((float(found[1]), float(found[2])))

    tune = [{"name": "vectors", **STEPS, "lr": 0.01}, {"name": "books", **STEPS}]
    quick = {"restarts": 1, "rounds": 1}
    done = short(tmp_path / "out", FORMAT, "vptq", options=quick, tune=tune, progress=note, **FEW)
    assert len(told) == 4 and all(after <= before for before, after in told)
    assert all(after < before for before, after in told[1:]), told  # vectors, books, vectors, books
    layers = [layer for layer in done.manifest["layers"] if layer["method"] == "vptq" and layer["block"] is not None]
    assert len(layers) == 14
    for layer in layers:
        rows, columns = layer["shape"]
        assert layer["format"] == FORMAT and layer["kernel"].startswith("vector_linear")
        assert layer["nbytes"] == 2 * -(-rows // 4) * columns // 2 + 2 * 2 * 16 * 4, layer["name"]
    ours = fewbit.load(tmp_path / "out")
    layer = ours.model.layers[0].mlp.down_proj
    assert layer.prepared.kernel == layers[0]["kernel"]
    assert abs(probe_kl(ours) / done.manifest["check"]["kl_mean"] - 1) < 0.02


def test_plans_refuse_what_is_no_vector_and_offer_vptq_where_others_refuse(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="do not stand for several weights"):
        fewbit.plan(tiny, "int4/g32", method="vptq")
    with pytest.raises(UnsupportedError, match="methods rtn, skm, vptq take it"):
        fewbit.plan(tiny, FORMAT, method="gptq")
    for name in ("books", "vectors"):
        with pytest.raises(UnsupportedError, match=r"no codebook of vectors; tuning rounding or .* for this layer$"):
            fewbit.plan(tiny, "int4/g32", method="gptq", tune=[name])
    with pytest.raises(UnsupportedError, match=r"no float16 number a block.*; no tuning takes it: leave it out"):
        fewbit.plan(tiny, "nf4/g32/dq", method="gptq", tune=["scales"])
    with pytest.raises(UnsupportedError, match="rounding"):
        fewbit.plan(tiny, FORMAT, method="vptq", tune=["rounding"])


def test_plans_count_a_book_of_outliers_and_refuse_one_that_is_of_no_use(tiny: Path) -> None:
    options = {"outliers": 0.1, "outlier_bits": 4}
    plain, more = (fewbit.plan(tiny, "vector4x4", method="vptq", options=own) for own in ({}, options))
    for before, after in zip(plain.decisions, more.decisions, strict=True):
        if after.rule is None or after.rule.method != "vptq" or after.site.block is None:
            continue
        rows, columns = after.site.shape
        count = max(1, round(0.1 * columns))
        codes = -(-4 * count // 8) * -(-rows // 2) + -(-4 * (columns - count) // 8) * -(-rows // 4)
        assert after.nbytes == codes + 2 * (16 * 2 + 16 * 4) + 2 * columns > before.nbytes
    with pytest.raises(SpecError, match=r"layer model\.layers\.0\.\S+: .* 4096 entries for the \d+ vectors"):
        fewbit.plan(tiny, "vector4x4", method="vptq", options={**options, "outlier_bits": 12})
    with pytest.raises(SpecError, match="option outliers = 2 of method vptq; out of range"):
        fewbit.plan(tiny, "vector4x4", method="vptq", options={"outliers": 2})
    with pytest.raises(SpecError, match="weights are 2, 4"):
        fewbit.plan(tiny, "vector4x4", method="vptq", options={**options, "outlier_length": 5})
    rules = (Rule("kind:embedding", "float"), Rule("*", "vector4x4", "vptq", options, "int8/channel"))
    with pytest.raises(UnsupportedError, match="its parts would round their inputs each on its own"):
        fewbit.plan(tiny, Recipe(rules))
