# SPDX-License-Identifier: Apache-2.0
"""A quantized layer that rewrites its inputs: in the right order, before rounding, and to the benefit of outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit import formats, methods, transforms
from fewbit.containers import terms as T
from fewbit.core.facts import Facts
from fewbit.core.rewrite import Chain, Rotation, Scale
from fewbit.errors import VerificationError
from fewbit.kernels.reference import round_activations
from fewbit.layouts import named
from fewbit.model.layers import QuantLinear

W8, A8 = "int8/channel/sym", "int8/channel/sym"


def layer(weight: Tensor, chain: Chain, activation: str | None, bias: nn.Parameter | None = None) -> QuantLinear:
    """``weight`` rounded to 8 bits for inputs that go through ``chain``."""
    made = QuantLinear(T.dense(W8, "dense", tuple(weight.shape)), bias, activation, chain.kinds)
    packed = methods.rtn(chain.weight(weight), formats.parse(W8)).repack(named("dense"))
    for name, tensor in {"packed": packed.packed, **packed.params}.items():
        setattr(made, f"weight_{name}", tensor)
    for name, tensor in chain.arrays.items():
        setattr(made, f"input_{name}", tensor)
    return made


def sample(tokens: int = 5, columns: int = 48, rows: int = 7) -> tuple[Tensor, Tensor, Chain]:
    generator = torch.Generator().manual_seed(0)
    scale = Scale(torch.randn(columns, generator=generator).exp().half())
    x, weight = torch.randn(tokens, columns, generator=generator), torch.randn(rows, columns, generator=generator)
    return x, weight, Chain((scale, Rotation.random(columns, 3)))


@pytest.mark.parametrize("activation", [None, A8])
@torch.no_grad()
def test_inputs_are_rewritten_then_rounded_then_multiplied(activation: str | None) -> None:
    x, weight, chain = sample()
    bias = nn.Parameter(torch.arange(7.0))
    made = layer(weight, chain, activation, bias)
    stored = made.qtensor().dequantize().double()
    rounded = round_activations(chain.apply(x), made.activation).double()
    expected = rounded @ stored.T + bias.double()
    bound = (x.shape[1] + 64) * 2.0**-23 * (rounded.abs() @ stored.abs().T + bias.abs()) + 1e-30
    assert ((made(x).double() - expected).abs() <= bound).all()
    assert made(x.reshape(1, 5, 48)).shape == (1, 5, 7)


@torch.no_grad()
def test_a_short_dtype_is_rounded_once_at_the_end() -> None:
    x, weight, chain = sample()
    made = layer(weight, chain, None)
    x = x.bfloat16()
    assert torch.equal(made(x), made(x.float()).bfloat16()) and made(x).dtype == torch.bfloat16


def test_gradients_reach_the_inputs() -> None:
    x, weight, chain = sample()
    made = layer(weight, chain, None)
    x.requires_grad_()
    made(x).sum().backward()
    effective = chain.unweight(made.qtensor().dequantize())
    assert x.grad is not None and torch.allclose(x.grad, effective.sum(0).expand(5, -1), atol=1e-4)


def test_casting_a_layer_changes_neither_its_numbers_nor_what_it_saves() -> None:
    x, weight, chain = sample()
    made = layer(weight, chain, None)
    made.prepare()
    with torch.no_grad():
        before = made(x)
        made.to(torch.bfloat16)
        assert torch.equal(made(x), before)
    saved = made.state_dict()
    assert {name: saved[f"input_{name}"].dtype for name in chain.arrays} == {
        "0_scale": torch.float16,
        "1_signs": torch.uint8,
    }
    assert all(torch.equal(saved[f"input_{name}"], tensor) for name, tensor in chain.arrays.items())


@pytest.mark.parametrize("fault", [lambda scale: scale.float(), lambda scale: scale * 0, lambda scale: scale / 0])
def test_arrays_that_cannot_be_are_refused(fault: object) -> None:
    _, weight, chain = sample()
    made = layer(weight, chain, None)
    made.input_0_scale = fault(made.input_0_scale)  # type: ignore[operator]
    with pytest.raises(VerificationError, match=r"scale"):
        made(torch.ones(1, 48))


@torch.no_grad()
def test_smoothing_saves_what_an_outlier_channel_would_wipe_out() -> None:
    """Ones beside one channel of 512, weights of one: y = 63 + 512.

    Alone, 8 bits a token have steps of 1024 / 255 > 4, so every one of the 63 ones becomes zero, and the outlier's own
    product is off by less than 2 / 127 of 512. After smoothing with alpha = 1/2 the outlier is sqrt(512) times as large
    as the rest in input and weight: half a step is sqrt(512) / 255 < 0.0888 of a one on either side, so a product of
    ones is off by less than 1.0888^2 - 1 < 0.186.
    """
    x, weight = torch.ones(3, 64), torch.ones(5, 64)
    x[:, 9] = 512
    outlier = 512 * 2 / 127
    smooth = Chain((transforms.named("smooth")(weight, Facts.of(x), 0, formats.parse(W8)),))
    alone, smoothed = (layer(weight, chain, A8)(x) - 575 for chain in (Chain(), smooth))
    assert float(alone.abs().min()) >= 63 - outlier
    assert float(smoothed.abs().max()) <= 63 * 0.187 + outlier
    assert float(smoothed.abs().max()) < float(alone.abs().min())
