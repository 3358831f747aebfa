# SPDX-License-Identifier: Apache-2.0
"""Layers of a network solved one after the other: on what the quantized network itself shows them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewbit import Recipe, methods, network
from fewbit.core.facts import Facts
from fewbit.core.observers import Seen
from fewbit.errors import InputError
from fewbit.formats import parse
from fewbit.kernels.reference import unfold
from fewbit.model.convolution import window_of

LAYERS = ("first", "second", "middle", "last")


class Small(nn.Module):
    """A convolution, one in groups, and two linear layers; a shortcut around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (self.second(x) + x).relu().mean((2, 3))
        y: Tensor = self.last(self.middle(x).relu())
        return y


def small() -> tuple[Small, list[Tensor]]:
    torch.manual_seed(0)
    return Small().eval(), [torch.randn(6, 3, 7, 5) for _ in range(3)]


@torch.no_grad()
def inputs(of: nn.Module, batches: list[Tensor], names: tuple[str, ...] = LAYERS) -> dict[str, list[Tensor]]:
    """What each layer is given, batch by batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        of.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
        for name in names
    ]
    for batch in batches:
        of(batch)
    for handle in handles:
        handle.remove()
    return found


def facts(layer: nn.Module, seen: list[Tensor]) -> Facts:
    """Of the windows of a convolution's inputs, or of a linear layer's."""
    if not isinstance(layer, nn.Conv2d):
        parts = seen
    else:
        window = window_of(layer)
        parts = [unfold(x, window, 0, len(x) * 35).reshape(-1, layer.weight[0].numel()) for x in seen]  # 7 x 5 places
    total = Facts.of(parts[0], gram=True)
    for part in parts[1:]:
        total = total.merge(Facts.of(part, gram=True))
    return total


def test_each_layer_is_solved_on_what_the_quantized_layers_before_it_make() -> None:
    """The finished network shows every layer exactly that, as none of them changes what comes before it."""
    made, batches = small()
    found = network.quantize(made, "int3/channel", batches, method="gptq", sequential=True)
    apart = network.quantize(made, "int3/channel", batches, method="gptq")
    assert found.sequential and not apart.sequential
    shown, before = inputs(found.network, batches), inputs(made, batches)
    assert torch.equal(shown["first"][0], before["first"][0]) and not torch.equal(shown["last"][0], before["last"][0])
    differ = 0
    for name in LAYERS:
        layer = made.get_submodule(name)
        weight, format = layer.weight.detach().reshape(len(layer.weight), -1), parse("int3/channel")  # type: ignore[arg-type, union-attr, operator]
        for result, seen in ((found, shown), (apart, before)):
            expected = methods.gptq(weight, format, facts(layer, seen[name])).dequantize()
            assert torch.equal(result.network.get_submodule(name).qtensor().dequantize(), expected), name  # type: ignore[operator]
        values = [result.network.get_submodule(name).qtensor().dequantize() for result in (found, apart)]  # type: ignore[operator]
        differ += not torch.equal(*values)
    assert differ >= 2


def test_grids_hold_what_comes_from_the_quantized_layers() -> None:
    made, batches = small()
    found = network.quantize(made, "int4/channel", batches, sequential=True)
    assert not any(record["activation"] for record in found.layers)
    rules = [{"match": "*", "format": "int3/channel", "activation": "int4/static/asym/mse"}]
    found = network.quantize(made, Recipe.from_dict({"rule": rules}), batches, sequential=True)
    shown = inputs(found.network, batches)
    for record in found.layers:
        expected = parse("int4/static/asym/mse").observed(Seen.of(torch.cat(shown[record["name"]])))  # type: ignore[attr-defined]
        assert record["activation"] == expected.name, record["name"]


@torch.no_grad()
def test_a_corrected_bias_takes_away_the_mean_error_of_all_layers_before() -> None:
    made, batches = small()
    means = []
    for sequential in (False, True):
        found = network.quantize(made, "int3/channel", batches, correct_bias=True, sequential=sequential)
        shown, wanted = inputs(found.network, batches), inputs(made, batches)
        means.append([])
        for name in LAYERS:
            off = torch.cat([found.network.get_submodule(name)(x) for x in shown[name]])
            off = off - torch.cat([made.get_submodule(name)(x) for x in wanted[name]])
            means[-1].append(float(off.transpose(0, 1).flatten(1).mean(1).abs().max()))
    assert max(means[1]) < 2e-5 and max(means[0][1:]) > 1e-2


class Again(nn.Module):
    """A layer that runs twice, with another between, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.last = nn.Linear(4, 4), nn.Linear(8, 8)
        self.twice, self.between = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.twice(self.between(self.twice(x).relu())))
        return y


def test_layers_that_run_twice_or_never() -> None:
    torch.manual_seed(5)
    made, batches = Again().eval(), [torch.randn(40, 8), torch.randn(30, 8)]
    found = network.quantize(made, "int3/channel", batches, method="gptq", sequential=True)
    assert [record["name"] for record in found.layers] == ["never", "last", "twice", "between"]
    # both runs of it, the second behind a layer that is still in float then
    half = copy.deepcopy(made)
    half.between.load_state_dict(made.between.state_dict())
    seen = inputs(half, batches, ("twice",))["twice"]
    expected = methods.gptq(made.twice.weight.detach(), parse("int3/channel"), facts(made.twice, seen)).dequantize()
    assert torch.equal(found.network.twice.qtensor().dequantize(), expected)  # type: ignore[union-attr, operator]
    plain = methods.rtn(made.never.weight.detach(), parse("int3/channel")).dequantize()
    assert torch.equal(found.network.never.qtensor().dequantize(), plain)  # type: ignore[union-attr, operator]


def test_it_needs_inputs_and_is_told_in_the_manifest(tmp_path: Path) -> None:
    made, batches = small()
    with pytest.raises(InputError, match="inputs="):
        network.quantize(made, "int4/channel", sequential=True)
    manifest = network.save(network.quantize(made, "int4/channel", batches, sequential=True), tmp_path / "out")
    assert manifest["sequential"] is True
