# SPDX-License-Identifier: Apache-2.0
"""Law 6 for rotations of whole models: nothing quantized, the logits of the rotated model are those of the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, LLAMA, ids, make
from torch import Tensor

from fewbit.errors import InputError
from fewbit.model import surgery
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.model.surgery import Preparation
from fewbit.transforms.quarot import turned

ROTATED = (
    *("llama", "llama-tied", "qwen2", "qwen3", "gemma", "mixtral", "qwen2-moe", "phi3", "granite"),
    *("gpt2", "starcoder2", "opt"),
)
CHANGES = {"opt": {"word_embed_proj_dim": 32}}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """``made(family)``: the folder of a tiny model of it."""
    monkeypatch.setitem(FAMILIES, "gemma", ("gemma", LLAMA))

    def folder(family: str) -> Path:
        make(family, tmp_path / family, **CHANGES.get(family, {}))
        return tmp_path / family

    return folder


def logits(folder: Path, preparation: Preparation | None, dtype: torch.dtype) -> Tensor:
    model = StreamedModel.open(open_checkpoint(folder), preparation)
    model.load("", dtype)
    return model.module.to(dtype)(input_ids=ids(), use_cache=False).logits


@pytest.mark.parametrize("family", ROTATED)
@torch.no_grad()
def test_law_6_logits_do_not_move(family: str, made: Callable[[str], Path]) -> None:
    folder = made(family)
    preparation = Preparation("quarot", {}, seed=3)
    # norms are float32 in transformers whatever the model is
    for dtype, within in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        original, rotated = (logits(folder, which, dtype) for which in (None, preparation))
        assert 0 < (rotated - original).abs().max() <= within * original.abs().max()


@torch.no_grad()
def test_what_is_turned_and_what_a_norm_leaves_behind(made: Callable[[str], Path]) -> None:
    folder, preparation = made("gemma"), Preparation("quarot", {}, seed=3)
    plain, rotated = (StreamedModel.open(open_checkpoint(folder), which) for which in (None, preparation))
    plain.load("", torch.float64)
    rotated.load("", torch.float64)
    before, after = plain.module.state_dict(), rotated.module.state_dict()
    done = rotated.surgery
    assert done is not None and all(bool(after[n].eq(0).all()) for n in after if n.endswith("layernorm.weight"))
    stream = done.turns["residual"].apply(torch.eye(32, dtype=torch.float64))
    heads = torch.block_diag(*[done.turns["heads.1"].apply(torch.eye(8, dtype=torch.float64))] * 4)
    assert (stream @ stream.T - torch.eye(32)).abs().max() < 1e-14
    layer = "model.layers.1"
    gain = 1 + before[f"{layer}.input_layernorm.weight"]
    query, value = (before[f"{layer}.self_attn.{name}_proj.weight"] * gain for name in "qv")
    output = before[f"{layer}.self_attn.o_proj.weight"]
    for name, expected in (
        ("self_attn.q_proj", query @ stream),
        ("self_attn.v_proj", heads[:16, :16].T @ value @ stream),
        ("self_attn.o_proj", stream.T @ output @ heads),
    ):
        assert (after[f"{layer}.{name}.weight"] - expected).abs().max() < 1e-14
    # a head that was tied is its own now, the last norm folded into it
    table, last = before["model.embed_tokens.weight"], 1 + before["model.norm.weight"]
    assert (after["lm_head.weight"] - (table * last) @ stream).abs().max() < 1e-14
    assert (after["model.embed_tokens.weight"] - table @ stream).abs().max() < 1e-14
    assert done.untied == "lm_head" and rotated.site("lm_head").tied_to is None
    assert set(done.online.values()) == {"hadamard"} and len(done.online) == 2


@torch.no_grad()
def test_large_matrices_are_turned_in_pieces(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, preparation = made("mixtral"), Preparation("quarot", {}, seed=3)
    whole = logits(folder, preparation, torch.float32)
    monkeypatch.setattr(surgery, "PIECE", 100)
    assert (logits(folder, preparation, torch.float32) - whole).abs().max() <= 1e-6 * whole.abs().max()


@torch.no_grad()
def test_a_bias_behind_a_gain_of_zero_is_refused(made: Callable[[str], Path]) -> None:
    folder = made("gpt2")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.0.ln_1.weight"))
    tensors[name][3] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="zero where its bias is not"):
        logits(folder, Preparation("quarot", {}), torch.float32)


@pytest.mark.parametrize("width", [8, 12, 36, 96])
def test_a_turn_about_ones_leaves_means_alone(width: int) -> None:
    turn = turned(width, seed=5, centred=True)
    matrix = turn.apply(torch.eye(width, dtype=torch.float64))
    ones = torch.ones(width, dtype=torch.float64)
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-13
    assert (matrix @ ones - ones).abs().max() < 1e-13 and (ones @ matrix - ones).abs().max() < 1e-13
    assert matrix.abs().max() < 0.999  # nothing but means stays where it was
