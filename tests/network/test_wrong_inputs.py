# SPDX-License-Identifier: Apache-2.0
"""What a new user gets wrong, and networks that are put together in unusual ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit import network
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.model.convolution import QuantConv2d
from fewbit.model.layers import QuantLinear
from fewbit.network import feeding

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(**more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, **more), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (X, r"a Tensor is no list of batches.*inputs=\[images\]"),
        ("images", "a str is no list"),
        (None, "a NoneType is no list"),
        ([X.numpy()], "batch 0 is a ndarray"),
        ([X[0]], r"inputs of 0; they are of shape \(4, 8, 8\); \(images, channels"),
        ([X, X[:, :3]], r"batch of \(2, 3, 8, 8\).*to have 4 channels"),
        ([X[:, :, :1, :1]], r"batch of \(2, 4, 1, 1\).*Kernel size"),
        ([(X * 9).long()], r"batch of \(2, 4, 8, 8\); Input type \(long"),
        ([{"pixels": X}], "batch of .*unexpected keyword argument 'pixels'"),
    ],
)
@pytest.mark.parametrize("sequential", [False, True])
def test_inputs_that_do_not_run_are_refused_in_words(inputs: Any, match: str, sequential: bool) -> None:
    with pytest.raises(InputError, match=match):
        network.quantize(conv(), "W8A8_STATIC", inputs, sequential=sequential)


class Failing(nn.Sequential):
    """Two convolutions; ``asking`` what torch is asked for on the way, which fails."""

    def __init__(self, asking: Callable[[], Any]) -> None:
        super().__init__(*conv())
        self.asking = asking

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        self.asking()
        return y


def no_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("sequential", [False, True])
def test_only_what_the_network_does_is_an_error_of_its_inputs(
    sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(made: nn.Module) -> None:
        network.quantize(made, "W8A8_STATIC", [X], sequential=sequential)

    with pytest.raises(InputError, match="size of tensor a"):
        quantize(Failing(lambda: X + X[:, :3]))
    with pytest.raises(torch.OutOfMemoryError):
        quantize(Failing(no_gpu_memory))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        quantize(Failing(lambda: torch.empty(1 << 50)))

    def broken(*_: Any) -> None:
        torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(feeding.Wanted, "look", broken)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        quantize(conv())


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("shape", [(4, 13), (4, 12), (4, 48), ()])
def test_inputs_of_another_width_are_refused_in_words(shape: tuple[int, ...], fold: bool, sequential: bool) -> None:
    """By the layer, whatever is looked at in its inputs before it runs."""
    made = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.ones(4, 24)
    with pytest.raises(InputError, match=r"running a Sequential on a batch of \("):
        network.quantize(made, "int4/g8", [x, torch.ones(shape)], method="gptq", sequential=sequential, fold=fold)
    wide = torch.ones(2, 9, 8, 8)
    with pytest.raises(InputError, match=r"batch of \(2, 9, 8, 8\).*to have 4 channels"):
        network.quantize(conv(), "int4/channel", [X, wide], method="gptq", sequential=sequential, fold=fold)


def test_what_is_no_network_recipe_or_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        network.quantize(3, "W8A8", [X])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a layer by itself.*Sequential"):
        network.quantize(nn.Conv2d(4, 8, 3), "W8A8", [X])
    for wrong in (None, {"rule": []}):
        with pytest.raises(SpecError, match=r"Recipe\.from_dict"):
            network.quantize(conv(), wrong, [X])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="seed; it is of type str: 'a'; a whole number"):
        network.quantize(conv(), "W8A8", [X], seed="a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"network\.quantize returned"):
        network.save(conv(), tmp_path / "out")  # type: ignore[arg-type]


@torch.no_grad()
def test_convolutions_are_loaded_as_they_were_or_not_at_all(tmp_path: Path) -> None:
    found = network.quantize(conv(), "int4/channel", [X])
    network.save(found, tmp_path / "out")
    assert torch.equal(network.load(tmp_path / "out", conv())(X), found.network(X))
    for other in ({"stride": 2}, {"padding": 1}, {"dilation": 2}):
        with pytest.raises(InputError, match="same class"):
            network.load(tmp_path / "out", conv(**other))


@torch.no_grad()
def test_ternary_convolutions_are_stored_in_the_bits_that_are_told(tmp_path: Path) -> None:
    found = network.quantize(conv(), "ternary/channel")
    network.save(found, tmp_path / "out")
    for record, place in zip(found.layers, (0, 2), strict=True):
        layer = found.network.get_submodule(str(place))
        assert isinstance(layer, QuantConv2d) and record["layout"] == "trits"
        stored = sum(t.nbytes for name, t in layer.state_dict().items() if name.startswith("weight_"))
        assert stored == record["nbytes"]
    assert torch.equal(network.load(tmp_path / "out", conv())(X), found.network(X))


class Several(nn.Module):
    """One layer under two names, one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.first, self.again = nn.Sequential(shared, nn.ReLU()), shared
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.tied(self.again(self.first(x)).tanh()).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"sequential": True}, {"method": "skm", "loss": "values"}])
@torch.no_grad()
def test_a_layer_with_two_names_is_replaced_under_both_and_stored_once(options: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    made, x = Several().eval(), torch.randn(9, 6)
    found = network.quantize(made, "palette2", [x], **options)
    assert [record["name"] for record in found.layers] == ["first.0", "tied", "other"]
    run = found.network
    assert isinstance(run.again, QuantLinear) and run.again is run.first[0]  # type: ignore[index]
    network.save(found, tmp_path / "out")
    again = network.load(tmp_path / "out", Several())
    assert again.again is again.first[0] and torch.equal(again(x), run(x))  # type: ignore[index]
    assert not any(name.startswith("again") for name in network.folder.state_of(run))


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_torchs_own_encoder_layers_run_their_quantized_layers(padded: bool, tmp_path: Path) -> None:
    def encoder() -> nn.TransformerEncoder:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()

    torch.manual_seed(2)
    made, x = encoder(), torch.randn(2, 5, 8)
    more = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])} if padded else {}
    found = network.quantize(made, "int8/channel", [{"src": x, **more}])
    y, expected = found.network(x, **more), made(x, **more)
    kept = ~more["src_key_padding_mask"] if padded else torch.ones(2, 5, dtype=torch.bool)
    assert 0 < float((y - expected)[kept].abs().max()) < 0.05
    assert {entry["name"].rpartition("layers.")[2] for entry in found.skipped} >= {"0.self_attn", "1.self_attn"}
    network.save(found, tmp_path / "out")
    assert torch.equal(network.load(tmp_path / "out", encoder())(x, **more), y)


class AsksItsLayer(nn.Module):
    """For what a layer in few bits does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + len(self.inner.__constants__)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sequential", [False, True])
def test_a_network_that_asks_a_layer_for_what_it_has_not_is_refused_by_name(sequential: bool) -> None:
    made = nn.Sequential(AsksItsLayer(), AsksItsLayer()).eval()
    match = r"quantizing 0\.inner; the network's own code asks that layer for '__constants__'.*match = .0\.inner."
    with pytest.raises(UnsupportedError, match=match):
        network.quantize(made, "int8/channel", inputs=[torch.randn(4, 16)], sequential=sequential)
