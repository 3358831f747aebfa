# SPDX-License-Identifier: Apache-2.0
"""What layers of a network learn together: the loss is that of what runs, gradients are the definition's."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewbit import Recipe, network
from fewbit.errors import InputError, UnsupportedError
from fewbit.formats import parse
from fewbit.formats.fixed import Fixed
from fewbit.kernels.reference import round_activations
from fewbit.network.distill import KEPT, LOOKS, distill
from fewbit.network.ends import Ends
from fewbit.network.quantized import Quantized


class Residual(nn.Module):
    """A convolution, and one in groups, beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)  # type: ignore[no-any-return]


class Toy(nn.Module):
    """Two blocks, and a linear layer for every position; takes keywords too."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Residual(), Residual())
        self.tail = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"found": self.tail(self.body(self.head(images)).permute(0, 2, 3, 1))}


def toy() -> tuple[Toy, list[Tensor]]:
    torch.manual_seed(0)
    return Toy().eval(), [torch.randn(4, 3, 8, 8) for _ in range(3)]


def recipe(format: str = "int3/channel/asym", activation: str | None = "int3/static/minmax", **tune: Any) -> Recipe:
    rule = {"match": "*", "format": format, "tune": [{"name": "bounds", "batch": 2, "lr": 0.03, **tune}]}
    if activation is not None:
        rule["activation"] = activation
    return Recipe.from_dict({"rule": [{"match": "head", "format": "float"}, rule]})


def told(found: network.Quantized) -> tuple[float, float]:
    """The loss before and after."""
    (outcome,) = found.layers[0]["tuned"]
    match = re.fullmatch(r"loss (\S+) -> (\S+) by \w+", outcome)
    assert match is not None
    return float(match[1]), float(match[2])


@torch.no_grad()
def loss(found: nn.Module, made: nn.Module, batches: list[Tensor], relative: float = 1.0) -> float:
    """From the definition, in float64."""
    total = 0.0
    for batch in batches:
        ours, theirs = (module(batch)["found"].double().numpy() for module in (found, made))
        total += np.abs(ours - theirs).mean() / np.abs(theirs).mean() ** relative
    return float(total / len(batches))


def decoded(quantized: Quantized, layer: str) -> Tensor:
    weight: Tensor = quantized.network.get_submodule(layer).weight_of().dequantize()  # type: ignore[operator]
    return weight


@pytest.mark.parametrize("relative", [1.0, 0.5])
def test_the_loss_told_is_that_of_what_runs_and_it_falls(relative: float) -> None:
    made, batches = toy()
    plain = network.quantize(made, recipe(iters=0, relative=relative), batches)
    found = network.quantize(made, recipe(iters=30, relative=relative), batches)
    start, end = told(found)
    assert told(plain) == (start, start) and end < 0.9 * start
    assert loss(plain.network, made, batches, relative) == pytest.approx(start, rel=2e-3)
    assert loss(found.network, made, batches, relative) == pytest.approx(end, rel=2e-3)
    assert found.bits_per_weight == plain.bits_per_weight
    for before, after in zip(plain.layers, found.layers, strict=True):
        assert before["activation"] != after["activation"] and parse(after["activation"]).bound  # type: ignore[attr-defined]
        assert not torch.equal(decoded(plain, before["name"]), decoded(found, after["name"]))
    again = network.quantize(made, recipe(iters=30, relative=relative), batches)
    name = found.layers[0]["name"]
    assert torch.equal(decoded(again, name), decoded(found, name))


@torch.no_grad()
def test_what_was_learned_is_what_is_saved(tmp_path: Path) -> None:
    made, batches = toy()
    found = network.quantize(made, recipe(iters=4), batches)
    manifest = network.save(found, tmp_path / "out")
    again = network.load(tmp_path / "out", Toy())
    assert torch.equal(again(batches[0])["found"], found.network(batches[0])["found"])
    assert manifest["layers"][0]["tuned"] == found.layers[0]["tuned"]
    assert manifest["recipe"]["rule"][1]["tune"][0]["name"] == "bounds"


def test_no_step_and_steps_that_lose_leave_what_was_solved() -> None:
    made, batches = toy()
    bare = Recipe(tuple(replace(rule, tune=()) for rule in recipe().rules))
    solved = network.quantize(made, bare, batches)
    for options in ({"iters": 0}, {"iters": 4, "lr": 1.0}):
        found = network.quantize(made, recipe(**options), batches)
        assert told(found)[0] == told(found)[1]
        for ours, theirs in zip(found.layers, solved.layers, strict=True):
            assert torch.equal(decoded(found, ours["name"]), decoded(solved, theirs["name"]))
            assert ours["activation"] == theirs["activation"]


@pytest.mark.parametrize("kept", [0, KEPT])
def test_the_float_network_runs_once_a_batch_where_there_is_room(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []

    class Counting(Toy):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            runs.append(torch.is_grad_enabled())
            return super().forward(images)

    torch.manual_seed(0)
    made, batches = Counting().eval(), toy()[1]
    expected = network.quantize(made, recipe(iters=4), batches)
    monkeypatch.setattr(sys.modules[distill.__module__], "KEPT", kept)
    runs.clear()
    found = network.quantize(made, recipe(iters=4), batches)
    looks, steps = (1 + LOOKS) * 3, 4 * 2  # batches, of which there are 3, a step of 2
    calibration = 1 + 1 + 3  # folding asks for two, ranges for all
    at_last = 1  # of the quantized one
    assert len(runs) == calibration + looks + steps + (3 if kept else looks + steps) + at_last
    assert told(found) == told(expected)
    x = batches[0]
    assert torch.equal(found.network(x)["found"], expected.network(x)["found"])


@pytest.mark.parametrize("spelling", ["int3/static/asym", "int2/static/sym"])
def test_the_ends_round_as_the_grid_does_and_their_gradients_are_differences(spelling: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, outer = (torch.randn(400, generator=generator) for _ in range(2))
    grid = parse(spelling)
    assert isinstance(grid, Fixed)
    ends, values = Ends(grid.at(-0.9, 1.7)), [torch.tensor(v, dtype=torch.float64) for v in (0.04, -0.11)]
    assert ends.freeze(*ends.start.values()) == grid.at(-0.9, 1.7)
    leaves = [x.clone().requires_grad_(), *(v.clone().requires_grad_() for v in values)]
    rounded = ends.round(*leaves)
    bound = ends.freeze(*values)
    assert torch.equal(rounded.detach(), round_activations(x[None], bound)[0]) and bound != grid.at(-0.9, 1.7)
    found = torch.autograd.grad(rounded, leaves, outer)

    top, g, w = grid.levels - 1, outer.double().numpy(), x.double().numpy()
    place = w / bound.scale + bound.zero
    inside = (place >= 0) & (place <= top)
    code = np.clip(np.round(place), 0, top)
    assert 0 < inside.sum() < len(w)
    start, unit = ends._from, ends._unit

    def smooth(a: float, b: float) -> float:
        """What rounding added to codes and zero held still."""
        low, high = start["low"] + a * unit, start["high"] + b * unit
        if grid.symmetric:
            s = 2 * max(-low, high) / top
            zero = float(bound.zero)
        else:
            s = (high - low) / top
            zero = -low / s + (bound.zero + low0 / bound.scale)
        c = np.where(inside, w / s + zero + (code - place), code)
        return float(g @ (s * (c - zero)))

    low0 = start["low"] + float(values[0]) * unit
    a, b, h = *(float(v) for v in values), 1e-6
    by = ((smooth(a + h, b) - smooth(a - h, b)) / (2 * h), (smooth(a, b + h) - smooth(a, b - h)) / (2 * h))
    assert np.allclose([float(v) for v in found[1:]], by, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[0], torch.where(torch.from_numpy(inside), outer, 0.0))


def test_an_end_stops_at_zero() -> None:
    ends = Ends(Fixed(4, False).at(0.0, 3.0))
    assert ends.bounds["low"][1] == 0 and ends.bounds["high"] == (-1, 1)
    assert ends.freeze(torch.tensor(-0.2), torch.tensor(-1.0)).zero == 15


@pytest.mark.parametrize(
    "own", [{"method": "autoround", "options": {"iters": 30}}, {"tune": [{"name": "scales", "iters": 30}]}]
)
@torch.no_grad()
def test_other_tunings_and_corrected_biases_and_keywords(own: dict[str, Any]) -> None:
    """They leave the grids of inputs alone, but see what these do."""
    made, batches = toy()
    rule = {"match": "*", "format": "int2/channel/asym", "activation": "int3/static/minmax"}
    plain = network.quantize(made, Recipe.from_dict({"rule": [rule]}), batches, correct_bias=True)
    named = [{"images": batch} for batch in batches]
    found = network.quantize(made, Recipe.from_dict({"rule": [{**rule, **own}]}), named, correct_bias=True)
    start, end = told(found)
    assert loss(plain.network, made, batches) == pytest.approx(start, rel=1e-3)
    assert loss(found.network, made, batches) == pytest.approx(end, rel=1e-3) and end < start
    assert [layer["activation"] for layer in found.layers] == [layer["activation"] for layer in plain.layers]


def test_what_cannot_be_learned_says_what_would_work() -> None:
    made, batches = toy()
    with pytest.raises(UnsupportedError, match=r"body.0.net.0.*window by window"):
        network.quantize(made, recipe(activation="int8/channel"), batches)
    with pytest.raises(UnsupportedError, match=r"bounds of palette4 for body"):
        network.quantize(made, recipe("palette4", None), batches)
    with pytest.raises(InputError, match="tuning"):
        network.quantize(made, recipe(activation=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_16_bits_learn_in_float32(dtype: torch.dtype) -> None:
    made, batches = toy()
    found = network.quantize(made.to(dtype), recipe(iters=10), batches)
    before, after = told(found)
    assert after < before
    assert found.network(batches[0].to(dtype))["found"].dtype == dtype
