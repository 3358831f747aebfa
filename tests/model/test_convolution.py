# SPDX-License-Identifier: Apache-2.0
"""Quantized convolutions as layers: what they are made from, what they save, and a real network made of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fewbit import formats, kernels, methods
from fewbit.containers import terms as T
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Dense, Sparse, Terms
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import Window
from fewbit.model.convolution import Margin, QuantConv2d, margin_of, window, window_of
from fewbit.model.layers import round_inputs

W8 = A8 = "int8/channel/sym"
ROOT = Path(__file__).parents[2]


def quantized(conv: nn.Conv2d, weight: str = W8) -> QTensor:
    return methods.rtn(conv.weight.detach().reshape(conv.out_channels, -1), formats.parse(weight))


def sample() -> tuple[nn.Conv2d, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), torch.randn(2, 6, 9, 7)


@pytest.mark.parametrize("weight", [W8, "int4/g8/asym", "nf4/g64"])
@torch.no_grad()
def test_it_stands_where_the_convolution_stood(weight: str) -> None:
    conv, x = sample()
    matrix = quantized(conv, weight)
    layer = QuantConv2d.of(conv, matrix)
    conv.weight.copy_(matrix.dequantize().reshape(conv.weight.shape))
    torch.testing.assert_close(layer(x), conv(x))
    assert (layer.in_channels, layer.out_channels, layer.bias) == (6, 8, conv.bias)
    assert "6 -> " not in repr(layer) and matrix.format.name in repr(layer) and "groups=2" in repr(layer)


@torch.no_grad()
def test_what_is_saved_loads_and_gives_the_same() -> None:
    conv, x = sample()
    layer = QuantConv2d.of(conv, quantized(conv), A8)
    before = layer.state_dict()
    expected = layer(x)
    twin = QuantConv2d(T.dense(W8, "dense", (8, 18)), window_of(conv), nn.Parameter(torch.zeros(8)), A8)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    cast = QuantConv2d.of(conv, quantized(conv)).bfloat16()
    assert all(tensor.dtype == before[name].dtype for name, tensor in cast.state_dict().items() if name != "bias")


@pytest.mark.parametrize("activation", [None, A8])
@torch.no_grad()
def test_a_sum_of_terms_stands_there_as_well(activation: str | None) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0)), torch.randn(2, 6, 9, 7)
    weight = conv.weight.reshape(8, -1)
    outliers = torch.where(weight.abs() > 0.12, weight, 0.0)
    base = methods.rtn(weight - outliers, formats.parse("int4/g8/asym"))
    terms = Terms((8, 36), (Dense(base), Sparse.of(outliers)), torch.rand(8).half())
    layer = QuantConv2d.of(conv, terms, activation)
    found = layer(x)
    conv.weight.copy_(terms.dequantize().reshape(conv.weight.shape))
    limit = 1e-5 if activation is None else 2e-2  # int8 inputs: half a step of 1/127 each, at the most
    assert float((found - conv(x)).abs().max()) <= limit * float(conv(x).abs().max())
    twin = QuantConv2d(layer.plain, window_of(conv), nn.Parameter(torch.zeros(8)), activation)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), found) and "sparse" in repr(layer)
    with pytest.raises(InputError, match=r"\(8, 36\)"):
        QuantConv2d.of(conv, Terms((8, 30), (Sparse.of(outliers[:, :30]),)))


@torch.no_grad()
def test_inputs_can_be_rounded_later() -> None:
    conv = nn.Conv2d(5, 7, 3, padding=1)
    x = torch.randn(1, 5, 9, 8)
    model = nn.Sequential(QuantConv2d.of(conv, quantized(conv)))
    float_ = model(x)
    round_inputs(model, formats.parse(A8))
    expected = QuantConv2d.of(conv, quantized(conv), A8)(x)
    assert torch.equal(model(x), expected) and not torch.equal(expected, float_)


def test_windows_of_torchs_convolutions() -> None:
    assert window_of(nn.Conv2d(4, 4, 3, 2, 1, 3, groups=2)) == Window((3, 3), (2, 2), (1, 1), (3, 3), 2)
    assert window_of(nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(1, 2))).padding == (1, 4)
    assert window_of(nn.Conv2d(4, 4, (2, 5), padding="valid")).padding == (0, 0)
    uneven, mirrored = nn.Conv2d(4, 4, 2, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert window_of(uneven).padding == window_of(mirrored).padding == (0, 0)
    assert margin_of(uneven) == Margin("constant", (0, 1, 0, 1)) and margin_of(nn.Conv2d(4, 4, 3, padding=1)) is None
    assert margin_of(mirrored) == Margin("reflect", (1, 1, 1, 1))
    with pytest.raises(UnsupportedError, match="one more zero"):
        window((2, 2), padding="same")
    with pytest.raises(InputError, match=r"\(8, 18\)"):
        QuantConv2d.of(sample()[0], quantized(nn.Conv2d(5, 8, 3)))


def cifar_resnets() -> ModuleType:
    """``bench/cifar_resnets.py``, or a skipped test where its files are absent."""
    pytest.importorskip("PIL", reason="the images are WebP")
    spec = importlib.util.spec_from_file_location("cifar_resnets", ROOT / "bench" / "cifar_resnets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.ASSETS.is_dir():
        pytest.skip("there is no folder of assets beside this checkout")
    return module


@pytest.mark.model
@torch.no_grad()
def test_a_network_keeps_its_answers() -> None:
    nets = cifar_resnets()
    images, labels = nets.test_images()
    images, labels = images[:200], labels[:200]
    model = nets.network(20)
    top1 = nets.accuracy(model, images, labels)
    answers = model(images)
    assert top1 >= 0.9  # 91.7 % of all images
    # 8 bits leave the answers where they were; 4 bits cost some points.
    for weight, activation, lost, moved in (
        (W8, None, 0.01, 0.02),
        (W8, A8, 0.015, 0.04),
        ("int4/channel/sym", None, 0.08, 0.5),
    ):
        twin = nets.network(20)
        nets.quantize(twin, weight, activation)
        assert sum(isinstance(module, QuantConv2d) for module in twin.modules()) == 19
        found = twin(images)
        assert float((found.argmax(1) == labels).double().mean()) >= top1 - lost
        assert float((found - answers).norm() / answers.norm()) < moved
        if activation and kernels.native.available():
            assert twin.conv1.prepared.kernel.startswith("int8_linear")
