# SPDX-License-Identifier: Apache-2.0
"""Products that a network's own code writes out: found, and then the same bits as with products put in by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import network
from fewbit.errors import InputError, UnsupportedError
from fewbit.network import Product, place_products
from fewbit.network.fold import distance

WAYS = ["at", "matmul", "bmm", "einsum", "attention", "causal", "masked", "by hand"]


class Attention(nn.Module):
    """As libraries write it: two heads, scores divided after the product. ``way``: by which function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv, self.out, self.way = nn.Linear(12, 36), nn.Linear(12, 12), way
        self.table = nn.Parameter(torch.randn(12, 12) / 4)
        self.register_buffer("mask", torch.ones(1, 1, 9, 9).tril(2))
        if way == "by hand":
            self.scores, self.mixed = Product(), Product()

    def multiplied(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.way == "at":
            return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        if self.way == "matmul":
            return torch.matmul(torch.matmul(q, other=k.transpose(-2, -1)).mul(scale).softmax(-1), v)
        if self.way == "bmm":
            weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).mul(scale).softmax(-1)
            return weights.bmm(v.flatten(0, 1)).unflatten(0, q.shape[:2])
        if self.way == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(scale).softmax(-1)
            return torch.einsum("bhij, bhjd -> bihd", weights, v).transpose(1, 2)
        if self.way == "by hand":
            return self.mixed((self.scores(q, k.transpose(-2, -1)) * scale).softmax(-1), v)  # type: ignore[no-any-return]
        more = {"causal": {"is_causal": True}, "masked": {"attn_mask": self.mask[..., : q.shape[2], : q.shape[2]] > 0}}
        return F.scaled_dot_product_attention(q, k, v, **more.get(self.way, {}))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x @ (self.table * 2).T  # by a weight: no product of activations
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.multiplied(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Toy(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.tail = nn.Sequential(Attention(way), Attention(way)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.body(x))  # type: ignore[no-any-return]


def toy(way: str) -> tuple[Toy, list[Tensor]]:
    torch.manual_seed(0)
    made = Toy("by hand")
    other = Toy(way)
    other.load_state_dict(made.state_dict())
    return other.eval(), [torch.randn(3, 9, 12) for _ in range(2)]


NAMES = [f"body.{block}.inline.{at}" for block in (0, 1) for at in (0, 1)]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("way", WAYS[:5])
@torch.no_grad()
def test_found_products_have_the_bits_of_those_put_in_by_hand(way: str, sequential: bool, tmp_path: Path) -> None:
    by_hand, batches = toy("by hand")
    made, _ = toy(way)
    y = made(batches[0])
    assert place_products(made, batches[0]) == NAMES
    torch.testing.assert_close(made(batches[0]), y)
    assert place_products(made, batches[0]) == []  # again: there are none left
    recipe = "W8A8_STATIC"
    found, expected = (network.quantize(of, recipe, batches, sequential=sequential) for of in (made, by_hand))
    assert [record["name"] for record in found.products] == NAMES
    assert [r["left"] for r in found.products] == [r["left"] for r in expected.products]
    assert [r["right"] for r in found.products] == [r["right"] for r in expected.products]
    x = torch.randn(2, 7, 12)  # another length
    assert torch.equal(found.network(x), expected.network(x)) and not torch.equal(found.network(x), made(x))
    assert torch.equal(copy.deepcopy(found.network)(x), found.network(x))
    manifest = network.save(found, tmp_path / "out")
    kind = {"einsum": "einsum", "attention": "attention"}.get(way, "matmul")
    calls = [["matmul", 0], *([[kind, 2]] if kind == "attention" else [[kind, 1], [kind, 1]])]
    assert manifest["inline"] == {"body.0": calls, "body.1": calls}
    again = network.load(tmp_path / "out", Toy(way))
    assert torch.equal(again(x), found.network(x))
    with pytest.raises(InputError, match="same class"):
        network.load(tmp_path / "out", nn.Sequential(nn.Linear(3, 3)))
    if way == "at":  # another class of the same names: it multiplies otherwise
        with pytest.raises(UnsupportedError, match=r"products of body.0.*now call 2 is of einsum"):
            network.load(tmp_path / "out", Toy("einsum"))(x)


@pytest.mark.parametrize("way", ["causal", "masked", "attention"])
@torch.no_grad()
def test_attention_written_out_is_what_torch_computes(way: str) -> None:
    made, batches = toy(way)
    exact = made.double()
    x = torch.cat(batches).double()
    y = exact(x)
    place_products(exact, batches[0])
    assert distance(exact(x), y) < 1e-12
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False  # of which nothing is seen
    q, k, v = torch.randn(3, 2, 4, 9, 6).double()
    k, v = k[:, :2], v[:, :2]
    from fewbit.network.inline import RUN

    more: dict[str, Any] = {"attn_mask": mask, "scale": 0.3, "enable_gqa": True}
    found = RUN["attention"]([Product(), Product()], q, k, v, **more)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **more))
    assert not found[:, :, 3].any()


def test_gradients_and_bounds_go_through_them() -> None:
    made, batches = toy("attention")
    place_products(made, batches[0])
    rules = [{"match": "*", "format": "int8/channel/sym", "activation": "int3/static/minmax"}]
    plain = network.quantize(made, network_recipe(rules), batches)
    rules[0]["tune"] = [{"name": "bounds", "iters": 20, "batch": 2, "lr": 0.03}]  # type: ignore[assignment]
    found = network.quantize(made, network_recipe(rules), batches)
    assert [a["left"] != b["left"] for a, b in zip(plain.products, found.products, strict=True)].count(True) > 1


def network_recipe(rules: list[dict[str, Any]]) -> Any:
    from fewbit import Recipe

    return Recipe.from_dict({"rule": rules})


class Chunked(nn.Module):
    """Products as many as there are parts of the input; ``parts`` of a kind each time, if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.inner(torch.cat([part @ y.mT for part in y.split(4, 1)], 1))  # type: ignore[no-any-return]


class Inner(nn.Module):
    """Multiplies by a weight alone, within a module that multiplies activations; the first call another than others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.matmul(self.weight, self.weight.mT)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Alternating()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(x))  # type: ignore[no-any-return]


class Alternating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.odd = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        self.odd = not self.odd
        y = self.layer(x)
        return y @ y.mT @ y if self.odd else torch.bmm(y, y.mT)


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x @ x.mT


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inline = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inline(x) @ x.mT  # type: ignore[no-any-return]


@torch.no_grad()
def test_what_changes_from_run_to_run_is_refused_by_name() -> None:
    torch.manual_seed(2)
    made = Chunked().eval()
    assert place_products(made, torch.randn(2, 8, 4)) == ["inline.0", "inline.1"]
    assert type(made).__name__ == "Chunked" and isinstance(made, Chunked)
    made(torch.randn(3, 7, 4))  # two parts, too
    for length, found in ((4, "there are 1"), (9, "call 3 is of matmul")):
        with pytest.raises(UnsupportedError, match=f"products of the network.*{found}"):
            made(torch.randn(2, length, 4))
    x = torch.randn(2, 4, 4)
    for other, match in (
        (Twice(), "products of part.*other calls each time"),
        (Own(nn.Linear(4, 4)), "Own runs all its children"),
        (Taken(), "called inline already"),
    ):
        before = {type(module) for module in other.modules()}
        with pytest.raises(UnsupportedError, match=match):
            place_products(other, x)
        assert {type(module) for module in other.modules()} == before
    assert place_products(nn.Sequential(nn.Linear(4, 4)), x) == []
