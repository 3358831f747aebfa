# SPDX-License-Identifier: Apache-2.0
"""Static activations in a run: grids fixed by calibration, stored, run by integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit import formats
from fewbit.calibrate import Text
from fewbit.errors import SpecError, UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.layers import QuantLinear
from fewbit.recipe import Recipe, Rule
from fewbit.run import opening, ranges

Short = Callable[..., Any]
Hashes = Callable[[Path], dict[str, str]]


def grids(manifest: dict[str, Any]) -> dict[str, Fixed]:
    found = {}
    for layer in manifest["layers"]:
        if layer["kind"] == "linear":
            grid = formats.parse(layer["activation"])
            assert isinstance(grid, Fixed) and grid.bound
            found[layer["name"]] = grid
    return found


@torch.no_grad()
def test_grids_are_of_what_layers_see_and_the_model_runs_on_them(short: Short, tiny: Path, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}
    observe = ranges.Seen.of

    def record(x: Tensor) -> Any:
        seen.setdefault("all", []).append(x.detach().float().clone())
        return observe(x)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranges.Seen, "of", staticmethod(record))
        result = short(
            tmp_path / "out", "int8/channel", method="rtn", head="float", threads=1, calibration_dtype="float32"
        )
    assert not seen  # nothing is static yet
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranges.Seen, "of", staticmethod(record))
        result = short(tmp_path / "static", "W8A8_STATIC", method="rtn", head="float", calibration_dtype="float32")
    found = grids(result.manifest)
    assert len(found) > 4 and len({grid.name for grid in found.values()}) > 4
    low = min(float(x.min()) for x in seen["all"])
    assert all(grid.scale * grid.zero <= -low * 1.01 for grid in found.values())
    plan = fewbit.plan(tiny, "W8A8_STATIC", head="float")
    assert plan.bits_per_weight == result.manifest["bits_per_weight"]
    check = result.manifest["check"]
    assert check["kl_mean"] < 0.05
    model = fewbit.load(tmp_path / "static", dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for name, grid in found.items():
        assert layers[name].activation == grid and layers[name].prepared.kernel.startswith("int8_linear")
    ids = torch.arange(40)[None] % 60
    close = fewbit.load(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert float((model(ids).logits - close).abs().max()) < 0.2 * float(close.abs().max())


def test_same_bytes_at_any_thread_count_and_with_transforms(short: Short, hashes: Hashes, tmp_path: Path) -> None:
    for threads in (1, 3):
        out = tmp_path / str(threads)
        made = short(out, "W8A8_STATIC", method="rtn", threads=threads, transforms=["smooth"])
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    plain = grids(short(tmp_path / "plain", "W8A8_STATIC", method="rtn").manifest)
    smoothed = grids(made.manifest)
    assert plain.keys() == smoothed.keys() and all(plain[name] != smoothed[name] for name in plain)


@pytest.mark.parametrize(
    "steps", [("smooth",), ("awq",), ("rotate",), ("hadamard",), ("smooth", "rotate"), ("quarot",), ("spinquant",)]
)
@torch.no_grad()
def test_from_a_text_every_transform_goes_before_a_static_grid(
    short: Short, tiny: Path, tmp_path: Path, steps: tuple[str, ...]
) -> None:
    """And the grid is of what it makes: those of the first layers cover their rewritten inputs, and no more."""
    transforms = [{"name": step, "steps": 2} if step == "spinquant" else step for step in steps]
    asked: dict[str, Any] = {"activation": "int8/static/asym/minmax", "transforms": transforms, "head": "float"}
    result = short(tmp_path / "out", "int8/channel", method="rtn", calibration_dtype="float32", **asked)
    assert result.manifest["check"]["kl_mean"] < 0.05
    found, model, seen = grids(result.manifest), fewbit.load(tmp_path / "out", dtype=torch.float32), {}
    assert len(found) == 14
    for part in "qkv":

        def look(layer: Any, given: tuple[Tensor, ...], name: str = f"model.layers.0.self_attn.{part}_proj") -> None:
            seen[name] = layer.rewrite().apply(given[0])

        model.get_submodule(f"model.layers.0.self_attn.{part}_proj").register_forward_pre_hook(look)
    checkpoint = open_checkpoint(tiny)
    model(opening.draw(checkpoint, checkpoint.words(), Text(8, 64), 0, opening.silent).ids)
    for name, x in seen.items():
        wanted = found[name].at(float(x.min()), float(x.max()))
        # the embedding that the rotation of a model moved is stored in 16 bits
        assert found[name].scale == pytest.approx(wanted.scale, rel=2.0**-7), name


def test_observers_differ_and_are_spelt_in_the_recipe(short: Short, tmp_path: Path) -> None:
    scales = {}
    for name in ("minmax", "entropy"):
        rules = (
            Rule("kind:embedding", "float"),
            Rule("kind:head", "float"),
            Rule("*", "int8/channel", activation=f"int8/static/sym/{name}"),
        )
        manifest = _quantize(short, tmp_path / name, Recipe(rules))
        assert manifest["recipe"]["rule"][2]["activation"] == f"int8/static/sym/{name}"
        scales[name] = {layer: grid.scale for layer, grid in grids(manifest).items()}
    pairs = [(scales["entropy"][name], scales["minmax"][name]) for name in scales["minmax"]]
    assert all(less <= most for less, most in pairs) and any(less < 0.9 * most for less, most in pairs)


def _quantize(short: Short, out: Path, recipe: Recipe) -> dict[str, Any]:
    return short(out, recipe, method="rtn").manifest  # type: ignore[no-any-return]


def test_a_grid_may_be_spelt_and_then_needs_no_data(short: Short, tmp_path: Path) -> None:
    rules = (
        Rule("kind:embedding", "float"),
        Rule("kind:head", "float"),
        Rule("*", "int8/channel", activation="int8/static/sym/s0.05"),
    )
    manifest = short(tmp_path / "out", Recipe(rules), method="rtn", force=True).manifest
    assert manifest["calibration"] is None
    assert {grid.scale for grid in grids(manifest).values()} == {float(torch.tensor(0.05))}


def test_what_cannot_be_static_is_refused_before_any_work(tiny: Path) -> None:
    with pytest.raises(SpecError, match="format of activations"):
        Rule("*", "int8/static/sym/s0.1")
    recipe = Recipe((Rule("*", "int8/channel"), Rule("kind:head", "int8/channel", activation="int8/static")))
    try:
        fewbit.plan(tiny, recipe)
    except UnsupportedError as error:
        assert "before the head" in str(error)
    else:  # the head is tied to the embedding
        assert recipe.rules[1].open_grid
