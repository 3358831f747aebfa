# SPDX-License-Identifier: Apache-2.0
"""Rotations of the whole model in a run: the folder works everywhere, its bytes are fixed, and refusals come first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.calibrate import Text
from fewbit.containers.files import read_json
from fewbit.containers.safetensors import open_safetensors
from fewbit.decode.engine import open_engine
from fewbit.errors import SpecError, UnsupportedError
from fewbit.kernels import native
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.model.surgery import Preparation
from fewbit.recipe import ModelStep, Recipe, Step
from fewbit.run import learning
from fewbit.run.learning import Learner
from fewbit.run.planning import make_plan
from fewbit.run.workers import workers
from fewbit.transforms.spinquant import cayley_step, deviation

Short = Callable[..., Any]
IDS = torch.arange(3, 60).unsqueeze(0)
LEARNED = {"name": "spinquant", "steps": 2, "batch": 3}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits[0]


def test_a_rotated_folder_is_the_model_in_transformers_and_in_the_native_decoder(
    short: Short, tiny: Path, tmp_path: Path
) -> None:
    plan = fewbit.plan(tiny, "int8/g32/sym", transforms=["quarot"])
    assert any("lm_head was tied" in warning and str(258 * 64) not in warning for warning in plan.warnings)
    result = short(tmp_path / "out", "int8/g32/sym", "rtn", transforms=["quarot"])
    assert read_json(result.path / "config.json")["tie_word_embeddings"] is False
    assert result.manifest["recipe"]["model"] == "quarot"
    rewritten = {r["name"] for r in result.manifest["layers"] if r["rewrites"]}
    assert rewritten == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    original, found = logits(tiny), logits(result.path)
    plain = logits(short(tmp_path / "plain", "int8/g32/sym", "rtn").path)
    # the rotated model is rounded elsewhere, by about as much: a wrong fold would be off by the logits themselves
    assert 0 < (found - original).norm() <= 2 * (plain - original).norm() < 0.1 * original.norm()
    engine = open_engine(result.path, kv="float32")
    if not native.available():
        return
    assert engine.name == "native"
    last = engine.feed([(engine.open(), IDS[0].tolist())])[0]
    assert (last - found[-1]).abs().max() <= 1e-4 * found.abs().max()


def test_a_learned_run_has_the_same_bytes_at_any_thread_count_and_when_continued(
    short: Short, hashes: Callable[[Path], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"transforms": [LEARNED], "method": "rtn", "format": "W4A4", "force": True}
    for threads in (1, 3):
        short(tmp_path / str(threads), threads=threads, **options)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event.kind == "block":
            raise Stop

    with pytest.raises(Stop):
        short(tmp_path / "again", progress=stop, **options)
    stored = open_safetensors(tmp_path / "again.partial" / "state" / "rotations.safetensors")
    assert set(stored.entries) == {"residual", "heads.0", "heads.1"}
    assert all(deviation(stored.get(name)) <= 1e-10 for name in stored.entries)
    monkeypatch.setattr(learning, "Learner", None)  # what was learned is not learned again
    short(tmp_path / "again", **options)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "1")


def learner(tiny: Path, format: str, **options: float) -> Learner:
    step = ModelStep("spinquant", options)
    preparation = Preparation(step.name, step.options, seed=1)
    checkpoint = open_checkpoint(tiny)
    model = StreamedModel.open(checkpoint, preparation)
    recipe = Recipe.simple(format, transforms=[{"name": "spinquant", **options}])
    plan = make_plan(checkpoint, model, recipe, Text(), force=True)
    assert model.surgery is not None
    return Learner(model, model.surgery, preparation, plan.decisions)


def windows(number: int) -> Tensor:
    return torch.randint(2, 258, (number, 24), generator=torch.Generator().manual_seed(4))


def test_the_gradient_of_a_rotation_is_that_of_the_loss(tiny: Path) -> None:
    """Rounding left out, the loss does not change along the manifold, and off it as finite differences say."""
    subject, ids = learner(tiny, "W4A4"), windows(2)
    matrices = {name: turn.apply(torch.eye(turn.width, dtype=torch.float64)) for name, turn in subject.turns()}
    subject.decisions = []  # nothing is rounded
    with workers(2) as pool:
        loss, gradients = subject.gradients(matrices, ids, pool)
        for name, matrix in matrices.items():
            half = gradients[name].double() @ matrix.T
            assert (half - half.T).abs().max() <= 1e-4 * half.abs().max()
            towards = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            moved = {**matrices, name: matrix + 1e-2 * towards}
            back = {**matrices, name: matrix - 1e-2 * towards}
            slope = (subject.gradients(moved, ids, pool)[0] - subject.gradients(back, ids, pool)[0]) / 2e-2
            assert abs(slope - float((gradients[name] * towards).sum())) <= 0.05 * abs(slope) + 1e-3
    assert loss > 0


@pytest.mark.parametrize(("format", "share"), [("W4A4", 0.96), ("W3A16", 0.75)])
def test_learning_lowers_what_rounding_costs(tiny: Path, format: str, share: float) -> None:
    subject, ids = learner(tiny, format, steps=15, batch=4, kl=1), windows(4)
    for value in subject.values.values():
        value *= 6 if value.ndim == 2 else 1  # random weights are so small that rounding hardly shows
    start = {name: turn.apply(torch.eye(turn.width, dtype=torch.float64)) for name, turn in subject.turns()}
    with workers(2) as pool:
        end = subject.learn(ids, pool, lambda event: None)
        before, after = (subject.gradients(matrices, ids, pool)[0] for matrices in (start, end))
    assert 0 < after < share * before
    assert all(deviation(matrix) <= 1e-10 for matrix in end.values())


def test_a_cayley_step_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    gradient = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    skew = gradient @ matrix.T - matrix @ gradient.T
    for rate in (1e-6, 1.5):
        a = min(rate, 1 / float(skew.abs().sum(0).amax()))
        one = torch.eye(9, dtype=torch.float64)
        expected = torch.linalg.inv(one + a / 2 * skew) @ (one - a / 2 * skew) @ matrix
        found = cayley_step(matrix, gradient, rate)
        assert (found - expected).abs().max() <= 1e-13 and deviation(found) <= 1e-13
        assert ((gradient * (found - matrix)).sum() < 0) and not torch.equal(found, matrix)
    assert torch.equal(cayley_step(matrix, matrix, 1.0), matrix) or deviation(cayley_step(matrix, matrix, 1.0)) < 1e-13


def test_recipes_carry_the_model_transform() -> None:
    recipe = Recipe.simple("int4", transforms=["smooth", {"name": "quarot", "output": 1}])
    assert recipe.model == ModelStep("quarot", {"output": 1}) and recipe.rules[2].transforms == (Step("smooth"),)
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.to_toml().startswith("model = { name")
    with pytest.raises(SpecError, match="each rotates the whole model"):
        Recipe.simple("int4", transforms=["quarot", "spinquant"])
    with pytest.raises(SpecError, match="no such option"):
        Recipe.simple("int4", transforms=[{"name": "quarot", "steps": 3}])
    with pytest.raises(SpecError, match="out of range"):
        Recipe.simple("int4", transforms=[{"name": "quarot", "heads": 2}])


@pytest.mark.parametrize(
    ("family", "name", "match"),
    [
        ("gemma2", "quarot", "norms what is added"),
        ("phi", "quarot", "side by side"),
        ("bloom", "quarot", "no row of RESIDUALS"),
        ("gpt2", "spinquant", "subtract the mean"),
    ],
)
def test_models_that_cannot_absorb_a_rotation_are_refused_by_the_plan(
    tiny_family: Callable[[str], Path], family: str, name: str, match: str
) -> None:
    with pytest.raises(UnsupportedError, match=match):
        fewbit.plan(tiny_family(family), "int4/g32", transforms=[name])


def test_refusals_name_the_rotation_that_was_asked_for(tiny: Path) -> None:
    with pytest.raises(
        SpecError, match=r"squeezellm of \S+down_proj after transform quarot.*quarot with down=0"
    ) as caught:
        fewbit.plan(tiny, "palette4", method="squeezellm", transforms=["quarot"])
    assert "rotate" not in caught.value.works
    fewbit.plan(tiny, "palette4", method="squeezellm", transforms=[{"name": "quarot", "down": 0}])
