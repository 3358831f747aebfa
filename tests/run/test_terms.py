# SPDX-License-Identifier: Apache-2.0
"""Weights that are sums of terms, through the whole pipeline: planned, solved, written, read back, loaded, run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.containers import terms as T
from fewbit.containers.safetensors import open_safetensors
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Dense, Sparse, Terms
from fewbit.errors import UnsupportedError, VerificationError
from fewbit.recipe import Recipe, Rule
from fewbit.run import stages
from fewbit.run.events import Event
from fewbit.run.spread import spread
from fewbit.run.verify import read_back

Short = Callable[..., Any]
FORMAT = "palette4/rows16"
SHARES = {"outliers": 0.01, "sensitive": 0.005}
FEW: dict[str, Any] = {"options": SHARES, "calibration_dtype": "float32", "samples": 4, "context": 32}


@pytest.fixture(scope="module")
def whole(short: Short, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run, calibrated in float32."""
    out = tmp_path_factory.mktemp("terms") / "out"
    return short(out, FORMAT, "squeezellm", **FEW)


def again(short: Short, out: Path, **more: Any) -> Any:
    return short(out, FORMAT, "squeezellm", **{**FEW, **more})


def test_planned_bytes_are_those_of_the_files(tiny: Path, whole: Any) -> None:
    plan = fewbit.plan(tiny, FORMAT, method="squeezellm", options=SHARES)
    manifest = whole.manifest
    assert plan.bits_per_weight == manifest["bits_per_weight"]
    layers = {layer["name"]: layer for layer in manifest["layers"] if "terms" in layer}
    assert len(layers) == 14
    for decision in plan.decisions:
        if decision.site.name not in layers:
            continue
        layer = layers[decision.site.name]
        assert layer["kernel"] == decision.kernel and " + " in layer["kernel"]
        assert layer["format"] == f"{FORMAT} + sparse"
        rows, columns = layer["shape"]
        entries = round(0.01 * rows * columns) + round(0.005 * rows * columns)
        exact = rows * columns // 2 + 2 * 16 * -(-rows // 16) + 4 * entries + 4 * (rows + 1)
        assert layer["nbytes"] == decision.nbytes == exact
        assert layer["bits_per_weight"] == 8 * exact / (rows * columns)
    stored = sum(
        entry.nbytes
        for path in whole.path.glob("*.safetensors")
        for name, entry in open_safetensors(path).entries.items()
        if ".weight_" in name
    )
    assert stored == sum(layer["nbytes"] for layer in manifest["layers"])


def test_what_was_kept_apart_is_in_the_files_and_nearly_exact(tiny: Path, whole: Any) -> None:
    weights = open_safetensors(tiny / "model.safetensors")
    where = json.loads((whole.path / "model.safetensors.index.json").read_text())["weight_map"]
    for record in whole.manifest["layers"]:
        if "terms" not in record:
            continue
        read = read_back(whole.path / where[f"{record['name']}.weight_0_packed"], record)
        assert isinstance(read, Terms) and T.describe(read) == record["terms"]
        dense, sparse = read.terms
        assert isinstance(dense, Dense) and isinstance(sparse, Sparse)
        weight = weights.get(f"{record['name']}.weight").float()
        at, largest = (sparse.rows(), sparse.columns.long()), weight.abs().flatten().sort(descending=True)
        off = (read.dequantize() - weight).abs()
        assert float(off[at].max()) <= 2.0**-10 * float(weight.abs().max())
        kept = set((at[0] * weight.shape[1] + at[1]).tolist())
        assert set(largest.indices[: round(0.01 * weight.numel())].tolist()) <= kept


def test_the_loaded_model_runs_the_fused_kernel_and_is_what_was_checked(
    whole: Any, probe_kl: Callable[[Any], float]
) -> None:

    model = fewbit.load(whole.path)
    layer = model.model.layers[0].mlp.down_proj
    assert {what.partition(",")[0] for what, _ in layer.prepared.names} == {FORMAT, "sparse"}
    assert abs(probe_kl(model) / whole.manifest["check"]["kl_mean"] - 1) < 0.02


class Stop(Exception):
    pass


def test_stopped_and_continued_at_any_thread_count_the_bytes_are_the_same(
    short: Short, hashes: Callable[[Path], dict[str, str]], whole: Any, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if event.message == "sensitivity of block 2 of 2" or event.kind == "block":
            raise Stop

    out, stops = tmp_path / "out", 0
    while not out.exists():
        try:
            again(short, out, threads=3, progress=interrupt if stops < 3 else None)
        except Stop:
            stops += 1
    assert stops == 3
    assert hashes(out) == hashes(whole.path)


@pytest.mark.parametrize(
    ("array", "fault", "match"),
    [
        ("1_values", lambda values: values.flip(0), "decodes to other values"),
        ("1_columns", lambda columns: columns.long().flip(0).to(torch.uint16), "out of order|decodes to other"),
        ("1_pointers", lambda pointers: pointers.flip(0), "pointers go from"),
        ("1_values", None, "weight_1_values is missing"),
    ],
)
def test_faults_of_the_sparse_part_are_found(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: str, fault: Any, match: str
) -> None:
    good = stages.write_safetensors

    def bad(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        name = f"q_proj.weight_{array}"
        kept = {k: v for k, v in tensors.items() if fault or not k.endswith(name)}
        return good(path, {k: fault(v) if k.endswith(name) else v for k, v in kept.items()}, metadata)

    monkeypatch.setattr(stages, "write_safetensors", bad)
    with pytest.raises(VerificationError, match=match):
        again(short, tmp_path / "out", samples=2, context=32)
    assert not (tmp_path / "out").exists()


def test_a_kernel_that_forgets_the_sparse_part_is_found(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.run import solve

    good = solve.kernels.linear

    def bad(x: Tensor, weight: QTensor | Terms, **more: Any) -> Tensor:
        if isinstance(weight, Terms):
            assert isinstance(weight.terms[0], Dense)
            weight = weight.terms[0].qtensor
        return good(x, weight, **more)

    monkeypatch.setattr(solve.kernels, "linear", bad)
    with pytest.raises(VerificationError, match="further from the reference"):
        again(short, tmp_path / "out", samples=2, context=32)


def test_a_bound_is_of_every_magnitude_that_is_added() -> None:
    matrix = fewbit.methods.rtn(torch.tensor([[1.0, -2.0]]), fewbit.formats.parse("palette1"))
    sparse = Sparse.of(torch.tensor([[0.0, 3.0]]))
    total = Terms((1, 2), (Dense(matrix), sparse), torch.tensor([-2.0]), torch.tensor([1.0, 0.5]))
    assert spread(total, torch.eye(2)).T.tolist() == [[2.0, 5.0]]


def test_layers_whose_weight_cannot_be_a_sum_are_refused_in_the_plan(
    tiny: Path, tiny_family: Callable[[str], Path]
) -> None:
    options = {"method": "squeezellm", "force": True}
    with pytest.raises(UnsupportedError, match=r"gate_up_proj.*fused experts"):
        fewbit.plan(tiny_family("mixtral"), "palette4/row", **options)
    assert fewbit.plan(tiny_family("mixtral"), "palette4/row", **options, options={"outliers": 0, "sensitive": 0})
    rule = Rule("*", "palette4/row", "squeezellm", activation="int8/channel/sym")
    with pytest.raises(UnsupportedError, match="miss the rounding"):
        fewbit.plan(tiny, Recipe((Rule("kind:embedding", "float"), Rule("kind:head", "float"), rule)))


def test_experts_are_clustered_each_by_its_own_sensitivity(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    few: dict[str, Any] = {"samples": 4, "context": 32, "force": True, "head": "float"}
    manifest = fewbit.quantize(
        tiny_family("mixtral"), "palette3/row", method="skm", out=tmp_path / "out", **few
    ).manifest
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    assert {layer["method"] for layer in layers.values()} == {"skm"}
    assert layers["model.layers.0.mlp.experts.down_proj"]["experts"] == 4
    assert all(layer["relative_error"] < 0.35 for layer in layers.values())
