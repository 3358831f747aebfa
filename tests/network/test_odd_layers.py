# SPDX-License-Identifier: Apache-2.0
"""Layers that are padded, called, made or shaped in unusual ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fewbit import network
from fewbit.errors import InputError, UnsupportedError
from fewbit.network.fold import distance
from fewbit.recipe import Recipe

X = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(0))


class Of(nn.Module):
    """``code`` of itself and an input, and layers."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


PADDED = [
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular", "groups": 2},
    {"padding": "same", "padding_mode": "replicate", "dilation": 2},
    {"padding": "same", "kernel_size": (2, 4)},
]


def padded(more: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, **{"kernel_size": 3, **more}), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("recipe", ["W8A8", "W8A8_STATIC", "int4/channel"])
@pytest.mark.parametrize("more", PADDED, ids=str)
@torch.no_grad()
def test_padding_is_part_of_what_a_convolution_sees(more: Any, recipe: str, sequential: bool, tmp_path: Path) -> None:
    """As of the same network whose code pads first."""
    made = padded(more)
    conv = made[0]
    sides = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    plain = padded({**more, "padding": 0, "padding_mode": "zeros"})
    twin = Of(lambda self, x: self.layers(nn.functional.pad(x, sides, mode)), layers=plain)
    twin.load_state_dict({f"layers.{name}": value for name, value in made.state_dict().items()})
    method = "gptq" if recipe == "int4/channel" else "rtn"
    found, expected = (network.quantize(n, recipe, [X], method=method, sequential=sequential) for n in (made, twin))
    assert torch.equal(found.network(X), expected.network(X))
    assert 0 < distance(found.network(X), made(X)) < 0.3
    assert found.network[0].padding_mode == conv.padding_mode
    network.save(found, tmp_path / "out")
    assert torch.equal(network.load(tmp_path / "out", padded(more))(X), found.network(X))
    with pytest.raises(InputError, match="same class"):
        network.load(tmp_path / "out", padded({**more, "padding": 0, "padding_mode": "zeros"}))


def test_images_too_small_to_be_mirrored_are_refused_in_words() -> None:
    made = nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"))
    with pytest.raises(InputError, match=r"batch of \(1, 4, 2, 2\).*[Pp]adding"):
        network.quantize(made, "int4/channel", [torch.ones(1, 4, 2, 2)], method="gptq")


def test_a_weight_that_the_code_pads_for_by_itself_is_refused() -> None:
    pad, conv2d = nn.functional.pad, nn.functional.conv2d
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    made = Of(lambda self, x: conv2d(pad(x, (1, 1, 1, 1), "reflect"), self.conv.weight, self.conv.bias), conv=conv)
    with pytest.raises(UnsupportedError, match=r"quantizing conv; .*Margin\(mode='reflect'"):
        network.quantize(made, "int8/channel", [X])


@torch.no_grad()
def test_layers_may_be_called_by_keyword() -> None:
    made = Of(
        lambda self, x: self.out(input=self.conv(input=x).mean((2, 3))), conv=nn.Conv2d(4, 6, 3), out=nn.Linear(6, 2)
    )
    assert distance(network.quantize(made, "W8A8", [X]).network(X), made(X)) < 0.05


@torch.no_grad()
def test_norms_of_another_axis_than_a_linear_layers_are_not_folded() -> None:
    """Of (batch, 6, 6), the second axis: as many channels as the layer has rows, which are the third."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    made = nn.Sequential(nn.Linear(5, 6), norm, nn.Linear(6, 2)).eval()
    x = torch.randn(3, 6, 5)
    found = network.quantize(made, "int8/channel", [x])
    assert not found.folded and distance(found.network(x), made(x)) < 0.05
    with_four = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(4), nn.Linear(6, 2)).eval()
    assert not network.quantize(with_four, "int8/channel", [x[:, :4]]).folded


def test_casts_to_float_do_not_stand_in_the_way_of_networks_without_norms() -> None:
    made = Of(lambda self, x: self.out(x.float() / 255), out=nn.Linear(8, 3))
    images = torch.randint(0, 255, (4, 8), dtype=torch.uint8)
    found = network.quantize(made, "W8A8_STATIC", [images])
    assert distance(found.network(images).detach(), made(images).detach()) < 0.05
    normed = Of(lambda self, x: self.norm(self.out(x.float() / 255)), out=nn.Linear(8, 3), norm=nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedError, match=r"folding 1 batch norms; that is checked in float64.*fold=False"):
        network.quantize(normed, "int8/channel", [images])
    assert not network.quantize(normed, "int8/channel", [images], fold=False).folded


def test_layers_without_weights_of_their_own_are_refused_or_named() -> None:
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"1\.weight has no shape before the network has run"):
        network.quantize(lazy, "int8/channel", [torch.ones(2, 8)])
    for spoilt in (prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), nn.utils.weight_norm(nn.Linear(8, 8))):
        made = nn.Sequential(spoilt, nn.Linear(8, 3))
        with pytest.raises(InputError, match=r"quantizing 0; its weight is made anew .*prune\.remove first"):
            network.quantize(made, "int8/channel")
        kept = {"rule": [{"match": "0", "format": "float"}, {"match": "*", "format": "int8/channel"}]}
        with pytest.raises(InputError, match=r"a copy of a Sequential; .*inplace=True"):
            network.quantize(made, Recipe.from_dict(kept))
        assert len(network.quantize(copy.copy(made), Recipe.from_dict(kept), inplace=True).layers) == 1
    for dtype in (torch.float64, torch.complex64):
        with pytest.raises(UnsupportedError, match=f"quantizing 0; its weight is {dtype}"):
            network.quantize(nn.Sequential(nn.Linear(8, 8, dtype=dtype)), "int8/channel")
    empty = network.quantize(nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 3), nn.Linear(3, 3)), "int8/channel")
    assert [entry["reason"] for entry in empty.skipped] == ["its weight is empty"]
