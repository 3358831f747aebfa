# SPDX-License-Identifier: Apache-2.0
"""What stays in float is stored as narrowly as the source stores it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.folder import FolderCheckpoint
from fewbit.recipe import Recipe, Rule
from fewbit.run import stages

RECIPE = Recipe((Rule("*", "int8/channel"),))


def stored(tiny: Path, folder: Path, dtype: torch.dtype, *, norms: torch.dtype) -> Path:
    """The tiny model, whose config says float32, with matrices in ``dtype`` and norms in ``norms``."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: each.to(norms if each.dim() == 1 else dtype) for name, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_do_not_grow_where_the_config_names_a_wider_float(
    tiny: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = stored(tiny, tmp_path / "model", dtype, norms=dtype)
    planned = fewbit.plan(model, RECIPE)
    assert planned.size_bytes < planned.source_bytes and planned.warnings == []
    fewbit.quantize(model, RECIPE, out=tmp_path / "out")
    made = open_checkpoint(model)
    kept = {name: each for path in (tmp_path / "out").glob("*.safetensors") for name, each in load_file(path).items()}
    same = [name for name in made.keys() if name in kept]  # noqa: SIM118
    assert "model.embed_tokens.weight" in same and "model.norm.weight" in same
    for name in same:
        assert kept[name].dtype == dtype and torch.equal(kept[name], made.get(name))
    assert planned.size_bytes == sum(each.nbytes for each in kept.values())
    ids = torch.arange(3, 40).unsqueeze(0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(loaded(ids).logits).all()


def test_files_that_mix_floats_keep_what_holds_them_all(tiny: Path, tmp_path: Path) -> None:
    for name, dtype, norms in (("a", torch.float16, torch.float32), ("b", torch.float16, torch.bfloat16)):
        model = stored(tiny, tmp_path / name, dtype, norms=norms)
        assert open_checkpoint(model).dtype == torch.float32 == fewbit.plan(model, RECIPE).kept_dtype


@pytest.mark.parametrize(("head", "times"), [("float", 1), ("int8/g64", 2)])
def test_a_small_embedding_that_stays_in_float_is_read_once_for_both_ends(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str, times: int
) -> None:
    read: list[str] = []
    get = FolderCheckpoint.get
    monkeypatch.setattr(FolderCheckpoint, "get", lambda self, key: read.append(key) or get(self, key))
    fewbit.quantize(tiny, "int8/channel", head=head, out=tmp_path / "once")
    assert read.count("model.embed_tokens.weight") == times
    monkeypatch.setattr(stages, "HELD", 0)
    read.clear()
    fewbit.quantize(tiny, "int8/channel", head=head, out=tmp_path / "twice")
    assert read.count("model.embed_tokens.weight") == 2
    for path in (tmp_path / "once").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()
