# SPDX-License-Identifier: Apache-2.0
"""Every group of layers is solved on what the quantized groups before it make; the calibration goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fewbit
from fewbit import formats
from fewbit.core.facts import Facts
from fewbit.errors import ResumeError
from fewbit.kernels.reference import round_activations
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import Inputs, StreamedModel
from fewbit.recipe import Recipe, Rule
from fewbit.run import sequential, state, tasks
from fewbit.run.events import Event
from fewbit.run.hidden import HiddenBatches, HiddenFile
from fewbit.run.solve import Task
from fewbit.run.verify import read_back

Short = Callable[..., Any]
LLAMA = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
GROUPS = {
    "llama": LLAMA,
    "gemma2": LLAMA,
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
    "opt": [["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]],
    "mixtral": [["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]],
}
"""By the end of their names; one group alone where the block runs as a whole."""


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Facts]]:
    """The facts on which each site was solved, by name."""
    found: dict[str, list[Facts]] = {}
    good = tasks.solve

    def note(task: Task) -> Any:
        found[task.site.name] = task.facts
        return good(task)

    monkeypatch.setattr(tasks, "solve", note)
    return found


class Twin:
    """The model run block by block as a whole, with the layers quantized that a folder holds, its matrix products in
    ``dtype``."""

    def __init__(self, source: Path, out: Path, manifest: dict[str, Any], dtype: str) -> None:
        self.dtype = getattr(torch, dtype)
        self.model = StreamedModel.open(open_checkpoint(source))
        self.records = {record["name"]: record for record in manifest["layers"]}
        self.out, self.where = out, json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]

    def begin(self, batches: list[Tensor]) -> list[Inputs]:
        for path in self.model.before:
            self.model.load(path)
        for site in self.model.sites:
            if site.kind == "embedding":
                self.quantize(site.name)
        return [self.model.begin(batch) for batch in batches]

    def quantize(self, name: str) -> None:
        if (record := self.records.get(name)) is None:
            return
        decoded = read_back(self.out / self.where[f"{name}.weight_packed"], record).dequantize()
        self.model.set_weight(name, decoded.reshape(self.model.weight(name).shape))
        if record["activation"] is not None:
            format = formats.parse(record["activation"])
            self.model.module.get_submodule(name).register_forward_pre_hook(
                lambda module, x: round_activations(x[0], format)
            )

    def run(self, index: int, x: Tensor, more: Inputs) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.model.run_block(index, x, more)

    def facts(self, index: int, name: str, hidden: list[Tensor], inputs: list[Inputs]) -> Facts | None:
        """Of what ``name`` (its first expert) sees, merged batch by batch."""
        total: Facts | None = None
        for x, more in zip(hidden, inputs, strict=True):
            seen: list[Tensor] = []

            def keep(site: str, x: Tensor, expert: int | None, seen: list[Tensor] = seen) -> None:
                if site == name and not expert:
                    seen.append(x.clone())

            with self.model.observe(index, keep):
                self.run(index, x, more)
            if seen:
                found = Facts.of(seen[0], gram=True)
                total = found if total is None else total.merge(found)
        return total


def check(
    source: Path,
    out: Path,
    groups: list[list[str]],
    solved: dict[str, list[Facts]],
    dtype: Literal["float32", "bfloat16"] = "float32",
    **arguments: Any,
) -> None:
    """Quantize ``source`` and compare the facts of every layer with those of direct runs, bit for bit."""
    few: dict[str, Any] = {"samples": 8, "context": 32, "threads": 2, "force": True}
    manifest = fewbit.quantize(source, out=out, calibration_dtype=dtype, **few, **arguments).manifest
    words = open_checkpoint(source).tokenizer()
    ids = fewbit.run.calibrate.calibration(words, None, 8, 32, 0).ids
    twin, batches = Twin(source, out, manifest, dtype), list(ids.split(2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            inputs = twin.begin(batches)
            hidden = [more.hidden for more in inputs]
            for index, path in enumerate(twin.model.blocks):
                twin.model.load(path)
                for group in groups:
                    names = [s.name for s in twin.model.sites if s.block == index and s.name.endswith(tuple(group))]
                    assert len(names) == len(group)
                    for name in names:
                        if name not in twin.records:
                            continue  # stays in float
                        expected, got = twin.facts(index, name, hidden, inputs), solved[name][0]
                        assert expected is not None and expected.gram is not None
                        assert expected.tokens == got.tokens
                        assert (got.gram is not None) == (twin.records[name]["method"] == "gptq")
                        assert got.gram is None or torch.equal(expected.gram, got.gram), name
                        assert torch.equal(expected.total, got.total), name
                        assert torch.equal(expected.total_square, got.total_square), name
                    for name in names:
                        twin.quantize(name)
                hidden = [twin.run(index, x, more) for x, more in zip(hidden, inputs, strict=True)]
                twin.model.free(path)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", GROUPS)
def test_facts_are_those_of_a_direct_run(
    family: str,
    dtype: Literal["float32", "bfloat16"],
    tiny_family: Callable[[str], Path],
    tmp_path: Path,
    solved: dict[str, list[Facts]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fewbit.run.state, "BATCH_TOKENS", 64)  # four batches of two windows
    source = tiny_family(family)
    check(source, tmp_path / "out", GROUPS[family], solved, dtype, recipe="int4/g16/asym", method="gptq")
    stages = json.loads((tmp_path / "out.log.json").read_text())["stages"]
    orders = [stage["order"] for stage in stages if "order" in stage]
    assert len(orders) == 2
    assert all(order.startswith("as a whole, twice: ") == (len(GROUPS[family]) == 1) for order in orders), orders


def test_rounded_activations_are_what_later_groups_see(
    tiny_family: Callable[[str], Path], tmp_path: Path, solved: dict[str, list[Facts]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewbit.run.state, "BATCH_TOKENS", 64)
    recipe = Recipe((Rule("kind:linear", "int4/g16/asym", "gptq", activation="int8/channel/sym"), Rule("*", "float")))
    check(tiny_family("llama"), tmp_path / "out", LLAMA, solved, recipe=recipe)


def test_layers_in_float_or_without_data_stand_in_the_same_order(
    tiny_family: Callable[[str], Path], tmp_path: Path, solved: dict[str, list[Facts]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """q is rounded, o and up stay in float, the others are calibrated."""
    monkeypatch.setattr(fewbit.run.state, "BATCH_TOKENS", 64)
    recipe = Recipe(
        (
            Rule("re:.*[.]q_proj", "int8/g16/sym", "rtn"),
            Rule("re:.*[.](o|up)_proj", "float"),
            Rule("kind:linear", "int4/g16/asym", "gptq"),
            Rule("*", "float"),
        )
    )
    check(tiny_family("llama"), tmp_path / "out", LLAMA, solved, recipe=recipe)


def test_the_log_says_how_a_block_without_data_ran(short: Short, tmp_path: Path) -> None:
    short(tmp_path / "out", method="rtn")
    stages = json.loads((tmp_path / "out.log.json").read_text())["stages"]
    assert [stage.get("order") for stage in stages] == [None, "no data", "no data", None]


def test_a_block_that_runs_as_a_whole_is_told_once(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "note":
            notes.append(event.message)

    source = tiny_family("opt")
    more: dict[str, Any] = {"samples": 2, "context": 16, "force": True, "progress": listen}
    fewbit.quantize(source, "int4/g16/asym", method="gptq", out=tmp_path / "out", **more)
    assert len([note for note in notes if "runs as a whole, twice" in note]) == 1


def test_nothing_stays_of_what_a_block_kept(short: Short, tmp_path: Path) -> None:
    """Activations inside of a block have no name on disk; those between blocks are of the last stage alone, and of the
    calibration while a block follows."""
    folder, names = tmp_path / "out.partial" / "state", set()

    def look(event: Event) -> None:
        if event.kind == "done":
            return
        names.update(path.name for path in folder.iterdir())
        if event.kind == "block" and event.block < 4:
            found = {path.name for path in folder.iterdir()}
            kinds = ("calibration", "probe") if event.block < 3 else ("probe",)
            assert found == {"journal.json", *(f"{what}-{event.block - 1:05d}.f32" for what in kinds)}

    short(tmp_path / "out", progress=look)
    assert not [name for name in names if name.lstrip(".").startswith(("inputs", "outputs"))], names


@pytest.mark.parametrize("calibration_dtype", ["float32", "bfloat16"])
def test_activations_on_disk_or_in_memory_are_the_same(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration_dtype: str
) -> None:
    held = short(tmp_path / "held", calibration_dtype=calibration_dtype)
    for module in (state, sequential):
        monkeypatch.setattr(module, "HELD", 0)
    stored = short(tmp_path / "stored", calibration_dtype=calibration_dtype)
    assert held.manifest["files"] == stored.manifest["files"]


def test_norms_do_not_run_again_for_what_a_group_has_just_seen(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[torch.Size] = []
    norm = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: (ran.append(x.shape), norm(self, x))[1])
    held = short(tmp_path / "held")
    with_held, blocks = len(ran), {record["block"] for record in held.manifest["layers"]} - {None}
    monkeypatch.setattr(sequential, "HELD", 0)
    short(tmp_path / "stored")
    batches = len(ran) - 2 * with_held
    assert batches > 0
    assert batches % (2 * len(blocks)) == 0  # both norms of each block, and every batch


def test_batches_in_memory_are_kept_apart_from_what_they_are_part_of() -> None:
    kept, values = HiddenBatches((2, 1, 3, 4)), torch.randn(2, 3, 4)
    for index, batch in enumerate(values):
        kept.write(index, batch)
    before = values.clone()
    values.zero_()
    assert all(torch.equal(kept.read(index)[0], before[index]) for index in range(2))
    assert kept.read(0).shape == (1, 3, 4)


def test_scratch_files_have_no_name(tmp_path: Path) -> None:
    file = HiddenFile(tmp_path / "x.f32", (2, 1, 3, 4), "scratch")
    assert list(tmp_path.iterdir()) == []
    values = torch.randn(1, 3, 4)
    file.write(1, values)
    assert torch.equal(file.read(1), values)
    file.close()


def test_another_fewbit_of_the_same_version_does_not_continue(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbit.errors import QualityError
    from fewbit.run import ending, opening

    monkeypatch.setattr(ending, "MOST_KL", -1.0)  # leaves a finished journal behind
    with pytest.raises(QualityError):
        short(tmp_path / "out")
    monkeypatch.setattr(opening, "code_hash", lambda: "other")
    with pytest.raises(ResumeError, match="code was"):
        short(tmp_path / "out")
