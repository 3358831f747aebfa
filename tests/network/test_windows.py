# SPDX-License-Identifier: Apache-2.0
"""Attention in shifted windows, as SwinIR has it: what ``bench/swinir.py`` computes, and its products in integers."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit import Recipe, network
from fewbit.formats import parse

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The network's module. Its folder leaves sys.path at once: others look for packages called like files there."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("swinir")
    finally:
        sys.path.remove(str(BENCH))
        del sys.modules["swinir"]


def small(bench: ModuleType) -> tuple[nn.Module, list[Tensor]]:
    """Two groups of two layers, the second of each shifted, on images that are no whole number of windows."""
    torch.manual_seed(0)
    made = bench.SwinIR(channels=12, heads=2, size=4, depths=(2, 2)).eval()
    for weight in made.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return made, [torch.rand(2, 3, 10, 14) for _ in range(3)]


def rule(match: str, bits: int, observer: str = "minmax", **more: Any) -> dict[str, Any]:
    return {"match": match, "format": "int8/channel/sym", "activation": f"int{bits}/static/{observer}", **more}


def by_definition(attention: nn.Module, x: Tensor, size: int, shift: int) -> Tensor:
    """(high, wide, channels) float64: each position sees those in its window of the rolled image that lay on the same
    side of the image before, at most one window apart."""
    high, wide, channels = x.shape
    heads, inner = attention.heads, channels // attention.heads  # type: ignore[operator]
    qkv = attention.qkv(x).reshape(high, wide, 3, heads, inner)  # type: ignore[operator]
    table = attention.relative_position_bias_table.reshape(2 * size - 1, 2 * size - 1, heads)  # type: ignore[operator]
    y = torch.empty_like(x)
    for i, j in itertools.product(range(high), range(wide)):
        window = (i - shift) % high // size, (j - shift) % wide // size
        seen = [
            (k, m)
            for k, m in itertools.product(range(high), range(wide))
            if ((k - shift) % high // size, (m - shift) % wide // size) == window
            and abs(k - i) < size
            and abs(m - j) < size
        ]
        for head in range(heads):
            key = torch.stack([qkv[k, m, 1, head] for k, m in seen])
            bias = torch.stack([table[i - k + size - 1, j - m + size - 1, head] for k, m in seen])
            weights = (key @ qkv[i, j, 0, head] * inner**-0.5 + bias).softmax(0)
            value = torch.stack([qkv[k, m, 2, head] for k, m in seen])
            y[i, j, head * inner : (head + 1) * inner] = weights @ value
    return attention.proj(y)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_a_layer_is_what_its_definition_says(bench: ModuleType, shift: int) -> None:
    torch.manual_seed(0)
    layer = bench.Layer(8, 2, 4, shift, 2).double()
    layer.attn.relative_position_bias_table.data.normal_()
    x = torch.randn(1, 8, 12, 8, dtype=torch.float64)
    y = x + by_definition(layer.attn, layer.norm1(x)[0], 4, shift)
    expected = y + layer.mlp(layer.norm2(y))
    assert torch.allclose(layer(x, bench.mask(8, 12, 4, shift).double()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_products_of_shifted_windows_err_no_more_than_their_grids(bench: ModuleType, bits: int) -> None:
    """Scores err by da.b + a.db + da.db of half steps; the map, a softmax, by no more in sum than the worst score; and
    what is mixed by that, and the half steps of map and values. All before it stays in float."""
    made, batches = small(bench)
    float_rule = {"match": "*", "format": "float"}
    for number in (0, 1):  # not shifted, and shifted
        name = f"layers.0.residual_group.blocks.{number}.attn"
        rules = [rule(f"{name}.scores", bits), rule(f"{name}.mixed", bits), rule("conv_after_body", 8), float_rule]
        found = network.quantize(made, Recipe.from_dict({"rule": rules}), batches)
        (q, k), (p, v) = ([parse(product[side]).scale / 2 for side in ("left", "right")] for product in found.products)  # type: ignore[attr-defined]
        for batch in batches:
            seen = {of: passing(net, name, batch) for of, net in (("float", made), ("few", found.network))}
            (a, b), (_, values), y = seen["float"]
            off = q * b.abs().sum(-2).amax() + k * a.abs().sum(-1).amax() + q * k * a.shape[-1]
            positions = values.shape[-2]
            bound = (off + p * positions) * (values.abs().max() + v) + v
            error = (seen["few"][2] - y).abs().max()
            assert 0 < error <= bound


def passing(net: nn.Module, name: str, batch: Tensor) -> list[Any]:
    """Operands of both products of an attention, and what they end in."""
    found: list[Any] = []
    attention = net.get_submodule(name)
    handles = [
        attention.get_submodule(part).register_forward_pre_hook(lambda _, args: found.append(args))
        for part in ("scores", "mixed")
    ]
    handles.append(attention.get_submodule("mixed").register_forward_hook(lambda _, __, y: found.append(y)))
    net(batch)
    for handle in handles:
        handle.remove()
    return found


def test_ends_of_windows_are_learned_and_what_runs_is_what_is_saved(bench: ModuleType, tmp_path: Path) -> None:
    made, batches = small(bench)
    tune = [{"name": "bounds", "iters": 4, "batch": 1}]
    kept = [{"match": name, "format": "float"} for name in ("conv_first", "upsample.0")]
    few = {"format": "int4/channel/asym", "method": "clip", "tune": tune}
    rules = [*kept, rule("kind:product", 4, "dobi", **few), rule("kind:linear", 4, "dobi", **few)]
    found = network.quantize(made, Recipe.from_dict({"rule": rules}), batches)
    assert len(found.products) == 8 and len(found.layers) == 16
    reasons = {entry["name"]: entry["reason"] for entry in found.skipped}
    assert "WindowAttention" in reasons["layers.0.residual_group.blocks.1.attn"]
    network.save(found, tmp_path / "out")
    again = network.load(tmp_path / "out", bench.SwinIR(channels=12, heads=2, size=4, depths=(2, 2)))
    x = torch.rand(1, 3, 9, 7)
    assert torch.equal(again(x), found.network(x))
