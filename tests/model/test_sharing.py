# SPDX-License-Identifier: Apache-2.0
"""Layers fed the same tensor: computed in one call, with the bits they would have alone, whatever happens between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import formats, methods
from fewbit.core.rewrite import Chain, Rotation
from fewbit.kernels import native
from fewbit.layouts import named
from fewbit.model.layers import QuantLinear, share_inputs
from fewbit.model.sharing import FEW

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
PLAIN, ROTATION = Chain(), Chain((Rotation.random(64, 3),))
INT8 = "int8/g32/sym"


def layer(rows: int, seed: int, chain: Chain = PLAIN, bias: bool = False, activation: str | None = None) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    added = nn.Parameter(torch.randn(rows, generator=generator)) if bias else None
    made = QuantLinear("int4/g32/asym", "dense", (rows, 64), added, activation, chain.kinds)
    weight = torch.randn(rows, 64, generator=generator)
    packed = methods.rtn(chain.weight(weight), formats.parse("int4/g32/asym")).repack(named("dense"))
    for name, tensor in {"packed": packed.packed, **packed.params}.items():
        setattr(made, f"weight_{name}", tensor)
    for name, tensor in chain.arrays.items():
        setattr(made, f"input_{name}", tensor)
    made.prepare()
    return made


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of the core computed."""
    counts: list[int] = []
    core = native.core()

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(core, name)

        def linear_many(self, outputs: tuple[native.Output, ...], *rest: object) -> None:
            counts.append(len(outputs))
            core.linear_many(outputs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(native, "core", Spy)
    return counts


def trio(**options: object) -> nn.ModuleList:
    layers = nn.ModuleList([layer(rows, rows, **options) for rows in (33, 17, 5)])  # type: ignore[arg-type]
    share_inputs(layers)
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"activation": INT8}, FEW),
        ({"activation": INT8, "bias": True}, FEW),
        ({"chain": ROTATION}, 1),
        ({"activation": INT8, "chain": ROTATION}, 1),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_from_the_second_time_on_one_call_computes_all(
    options: dict[str, object], tokens: int, dtype: torch.dtype, mode: Callable[[], object], together: list[int]
) -> None:
    layers = trio(**options)
    with mode():  # type: ignore[attr-defined]
        for time in range(3):
            x = torch.randn(1, tokens, 64).to(dtype)
            together.clear()
            ys = [one(x) for one in layers]
            assert together == ([1, 1, 1] if time == 0 else [3])
            assert all(torch.equal(y, one.alone(x)) and y.dtype == dtype for y, one in zip(ys, layers, strict=True))


def learned() -> tuple[nn.ModuleList, Tensor]:
    """Three layers that know one another, and a tensor of which the first has been computed."""
    layers, x = trio(bias=True, activation=INT8), torch.randn(FEW, 64)
    for one in layers:
        one(x)
    x = torch.randn(FEW, 64)
    layers[0](x)
    assert len(layers[0].sharing._fed.waiting) == 2
    return layers, x


def _write(x: Tensor) -> None:
    x[0, 3] = 5


def _write_behind_the_back(x: Tensor) -> None:
    x.data[1, 7] = 5


def _zero_sign(x: Tensor) -> None:
    x.copy_(x * -1)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [_write, _write_behind_the_back, _zero_sign, Tensor.zero_, Tensor.t_, Tensor.unsqueeze_]
)
def test_a_tensor_changed_in_between_is_seen(change: Callable[..., object]) -> None:
    layers, x = learned()
    if change is Tensor.t_:
        layers, _ = learned()
        x = torch.randn(64, 64)
        layers[0](x)
    change(x, 0) if change is Tensor.unsqueeze_ else change(x)
    for one in layers[1:]:
        assert torch.equal(one(x), one.alone(x))


@torch.no_grad()
def test_a_layer_changed_in_between_is_seen() -> None:
    layers, x = learned()
    layers[1].bias.data += 1
    layers[2].round_inputs(formats.parse("int8/channel/sym"))
    for one in layers[1:]:
        assert torch.equal(one(x), one.alone(x))


@torch.no_grad()
def test_what_was_given_out_is_not_given_out_again() -> None:
    layers, x = learned()
    expected = layers[1].alone(x)
    layers[1](x).zero_()
    assert torch.equal(layers[1](x), expected)


@torch.no_grad()
def test_a_guess_that_failed_is_not_made_again(together: list[int]) -> None:
    layers, x = learned()
    layers[1](x)
    together.clear()
    for _ in range(3):
        x = torch.randn(FEW, 64)
        for one in layers:
            one(x)
    assert together == [2, 1] * 3


@torch.no_grad()
def test_layers_that_differ_in_rounding_or_rewrites_stay_apart(together: list[int]) -> None:
    other = Chain((Rotation.random(64, 4),))
    layers = nn.ModuleList([layer(8, 1), layer(8, 2, ROTATION), layer(8, 3, other), layer(8, 4, activation=INT8)])
    share_inputs(layers)
    for _ in range(3):
        x = torch.randn(FEW, 64)
        for one in layers:
            assert torch.equal(one(x), one.alone(x))
    assert max(together) == 1


@torch.no_grad()
def test_few_tokens_and_plain_inputs_are_not_worth_it(together: list[int]) -> None:
    for layers, tokens in ((trio(activation=INT8), FEW - 1), (trio(), FEW)):
        for _ in range(3):
            x = torch.randn(tokens, 64)
            for one in layers:
                one(x)
    assert max(together) == 1


@torch.no_grad()
def test_the_same_tensor_again_is_computed_again(together: list[int]) -> None:
    layers, x = learned()
    for one in layers[1:]:
        one(x)
    for _ in range(2):
        together.clear()
        ys = [one(x) for one in layers]
        assert together == [3]
        assert all(torch.equal(y, one.alone(x)) for y, one in zip(ys, layers, strict=True))


def test_gradients_are_not_shared(together: list[int]) -> None:
    layers = trio(activation=INT8)
    for _ in range(3):
        x = torch.randn(FEW, 64, requires_grad=True)
        sum(one(x).sum() for one in layers).backward()
    assert together == [1] * 9
    torch.testing.assert_close(x.grad[0], sum(one.qtensor().dequantize().sum(0) for one in layers))


def test_a_result_of_inference_mode_stays_in_it() -> None:
    with torch.no_grad():
        layers, x = learned()
    with torch.inference_mode():
        x = torch.randn(FEW, 64)
        layers[0](x)
        assert layers[1](x).is_inference()
    with torch.no_grad():
        assert not layers[2](x).is_inference()


@torch.no_grad()
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))])
def test_a_copy_learns_by_itself(twin: Callable[[nn.ModuleList], nn.ModuleList], together: list[int]) -> None:
    layers, x = learned()
    other = twin(layers)
    assert {one.sharing for one in other} == {other[0].sharing} != {layers[0].sharing}
    together.clear()
    for _ in range(2):
        x = torch.randn(FEW, 64)
        for mine, one in zip(layers, other, strict=True):
            assert torch.equal(one(x), mine.alone(x))
    assert 3 in together


@torch.no_grad()
def test_a_loaded_model_shares_and_answers_the_same(tiny: Path, tmp_path: Path, together: list[int]) -> None:
    fewbit.quantize(tiny, "int4/g32/asym", out=tmp_path / "out")
    model = fewbit.load(tmp_path / "out", activation="int8/g32")
    ids = torch.arange(FEW).reshape(1, FEW)
    first = model(ids).logits
    together.clear()
    assert torch.equal(model(ids).logits, first)
    assert together == [3, 1, 2, 1, 3, 1, 2, 1, 1]  # query key value, output, gate up, down; twice; head
