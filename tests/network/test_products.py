# SPDX-License-Identifier: Apache-2.0
"""Products of activations in a network: found, calibrated each operand by itself, learned along, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from fewbit import Recipe, network
from fewbit.cli import app
from fewbit.core.observers import Seen
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.formats import parse
from fewbit.kernels.reference import round_activations
from fewbit.model.product import QuantProduct
from fewbit.network import Product
from fewbit.network.fold import distance


class Attention(nn.Module):
    """Two heads, beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.scores, self.mixed = Product(), Product()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 6)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        weights = self.scores(q, k.transpose(2, 3)).softmax(3)
        return x + self.out(self.mixed(weights, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = nn.Sequential(Attention(), Attention()), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))  # type: ignore[no-any-return]


NAMES = ["body.0.scores", "body.0.mixed", "body.1.scores", "body.1.mixed"]


def toy() -> tuple[Toy, list[Tensor]]:
    torch.manual_seed(0)
    return Toy().eval(), [torch.randn(3, 9, 12) for _ in range(3)]


def rule(match: str = "*", activation: str | None = "int4/static/dobi", **more: Any) -> dict[str, Any]:
    made = {"match": match, "format": "int8/channel/sym", **more}
    return made if activation is None else {**made, "activation": activation}


def recipe(*rules: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"rule": list(rules)})


@torch.no_grad()
def seen(of: nn.Module, batches: list[Tensor], product: str) -> tuple[Tensor, Tensor]:
    """All that the operands of ``product`` were."""
    found: list[tuple[Tensor, ...]] = []
    handle = of.get_submodule(product).register_forward_pre_hook(lambda _, args: found.append(args))
    for batch in batches:
        of(batch)
    handle.remove()
    left, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    return left, right


def stand_in(found: network.Quantized, made: nn.Module) -> nn.Module:
    """The float network with what the layers decode to, and inputs and operands rounded by hooks."""
    twin = copy.deepcopy(made)
    grids = {record["name"]: record["activation"] for record in found.layers}
    for record in found.layers:
        layer = twin.get_submodule(record["name"])
        layer.weight.data = found.network.get_submodule(record["name"]).weight_of().dequantize()  # type: ignore[operator]
    for record in found.products:
        grids |= {f"{record['name']}.{side}": record[side] for side in ("left", "right")}
    for name, spelt in grids.items():
        grid = parse(spelt)
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, g=grid: (round_activations(args[0], g),))
    return twin


@pytest.mark.parametrize("bits", [8, 4, 2])
@torch.no_grad()
def test_each_operand_has_its_own_grid_and_what_runs_is_what_is_saved(bits: int, tmp_path: Path) -> None:
    made, batches = toy()
    grid = f"int{bits}/static/dobi"
    found = network.quantize(made, recipe(rule(activation=grid)), batches)
    assert [record["name"] for record in found.products] == NAMES and found.skipped == []
    for record in found.products:
        for side, x in zip(("left", "right"), seen(made, batches, record["name"]), strict=True):
            assert record[side] == parse(grid).observed(Seen.of(x)).name  # type: ignore[attr-defined]
        assert record["left"] != record["right"]
    weights = parse(found.products[1]["left"])
    assert weights.zero == 0  # type: ignore[attr-defined] # of a map, which has a floor, no code is below it
    x = torch.randn(4, 9, 12)
    y = found.network(x)
    assert distance(y, stand_in(found, made)(x)) < 2e-5 < distance(y, made(x))
    layers = sum(record["nbytes"] for record in found.layers)
    assert found.bits_per_weight == 8 * (layers + 4 * 10) / (2 * (36 + 12) * 12 + 36)
    manifest = network.save(found, tmp_path / "out")
    assert manifest["products"] == found.products
    again = network.load(tmp_path / "out", Toy())
    assert isinstance(again.get_submodule(NAMES[0]), QuantProduct) and torch.equal(again(x), y)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "4 products of activations in integers" in shown.output
    with pytest.raises(InputError, match="same class"):
        other = Toy()
        other.body[0].scores = nn.Identity()
        network.load(tmp_path / "out", other)


def test_gradients_pass_products_in_integers() -> None:
    made, batches = toy()
    found = network.quantize(made, recipe(rule(activation="int8/static/minmax")), batches)
    x, y = (batches[0].clone().requires_grad_() for _ in range(2))
    grads = [torch.autograd.grad(of(v).square().sum(), v)[0] for of, v in ((found.network, x), (made, y))]
    assert distance(*grads) < 0.05


def test_products_in_float_are_listed_with_the_reason() -> None:
    made, batches = toy()

    def reasons(*rules: dict[str, Any]) -> set[str]:
        found = network.quantize(made, recipe(*rules), batches)
        assert found.products == [] and [entry["name"] for entry in found.skipped if entry["name"] in NAMES] == NAMES
        return {entry["reason"] for entry in found.skipped if entry["name"] in NAMES}

    assert reasons(rule(activation=None)) == {"the recipe keeps activations in float"}
    assert reasons({"match": "kind:product", "format": "float"}, rule()) == {"the recipe keeps it in float"}
    assert reasons(rule("kind:linear")) == {"no rule of the recipe matches it"}
    (reason,) = reasons(rule(activation="int8/channel"))
    assert "token by token" in reason
    for match in ("kind:product", NAMES[2]):
        with pytest.raises(UnsupportedError, match="int8/static"):
            network.quantize(made, recipe(rule(match, "int8/channel"), rule()), batches)
    with pytest.raises(InputError, match=r"body.0.scores.*inputs="):
        network.quantize(made, recipe(rule("kind:product"), rule(activation=None)))
    with pytest.raises(SpecError, match="float"):
        network.quantize(made, recipe(rule("kind:product")), batches)
    spelt = network.quantize(made, recipe(rule("kind:product", "int8/static/sym/s0.05"), rule(activation=None)))
    assert {spelt.products[0][side] for side in ("left", "right")} == {"int8/static/sym/s0.05"}


@torch.no_grad()
def test_in_sequence_grids_are_of_what_the_quantized_layers_make() -> None:
    made, batches = toy()
    asked = recipe(rule(activation="int3/static/minmax"))
    apart, found = (network.quantize(made, asked, batches, sequential=on) for on in (False, True))
    partly = copy.deepcopy(found.network)
    partly.set_submodule(NAMES[2], Product())
    for side, x in zip(("left", "right"), seen(partly, batches, NAMES[2]), strict=True):
        record = found.products[2]
        assert record[side] == parse("int3/static/minmax").observed(Seen.of(x)).name  # type: ignore[attr-defined]
        assert record[side] != apart.products[2][side]


@torch.no_grad()
def loss(found: nn.Module, made: nn.Module, batches: list[Tensor]) -> float:
    """From the definition."""
    total = 0.0
    for batch in batches:
        ours, theirs = found(batch), made(batch)
        total += float((ours - theirs).abs().mean() / theirs.abs().mean())
    return total / len(batches)


@pytest.mark.parametrize("match", ["*", "kind:product"])
def test_bounds_of_operands_are_learned_with_the_others_or_alone(match: str) -> None:
    made, batches = toy()
    learning = {"name": "bounds", "iters": 40, "batch": 3, "lr": 0.03}
    base = rule(activation="int3/static/minmax")
    tuned = rule(match, "int3/static/minmax", tune=[learning])
    plain = network.quantize(made, recipe(base), batches)
    found = network.quantize(made, recipe(tuned, *([base] if match != "*" else [])), batches)
    assert loss(found.network, made, batches) < 0.97 * loss(plain.network, made, batches)
    pairs = list(zip(plain.products, found.products, strict=True))
    moved = [a[side] != b[side] for a, b in pairs for side in ("left", "right")]
    assert sum(moved) > 4  # bounds of q, k, the map and v, of both blocks
    layers = [a["activation"] != b["activation"] for a, b in zip(plain.layers, found.layers, strict=True)]
    assert all(layers) if match == "*" else not any(layers)
    if match == "*":
        (outcome,) = found.layers[0]["tuned"]
        assert loss(found.network, made, batches) == pytest.approx(float(outcome.split()[3]), rel=2e-3)
