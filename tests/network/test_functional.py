# SPDX-License-Identifier: Apache-2.0
"""Networks whose own code multiplies by the weight of a layer, without calling the layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from fewbit import network
from fewbit.errors import UnsupportedError
from fewbit.kernels.reference import round_activations
from fewbit.model.layers import Multiplier
from fewbit.network.fold import distance


class Windows(nn.Module):
    """As in Swin: attention within shifted windows of 4 by 4, which multiplies by weights of ``qkv`` and ``proj``; the
    bias of keys is zeroed, as in Swin V2."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.norm = shift, nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def linear(self, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, layer.weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        images, high, wide, _ = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(images, high // 4, 4, wide // 4, 4, 16).transpose(2, 3).reshape(-1, 16, 16)
        assert self.qkv.bias is not None
        bias = self.qkv.bias.clone()
        bias[16:32].zero_()
        q, k, v = self.linear(self.qkv, y, bias).view(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.linear(self.proj, y.transpose(1, 2).reshape(-1, 16, 16), self.proj.bias)
        y = y.view(images, high // 4, wide // 4, 4, 4, 16).transpose(2, 3).reshape(x.shape)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2))


class Swin(nn.Module):
    """Patches, of which the convolution is not called either, two attentions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, 5)
        self.blocks = nn.Sequential(Windows(0), Windows(2))

    def convolve(self, x: Tensor) -> Tensor:
        conv = self.patches
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, groups=conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(x.to(self.patches.weight.device)).permute(0, 2, 3, 1)
        x = self.blocks(x).mean((1, 2))
        return F.linear(input=x.to(self.head.weight.dtype), weight=self.head.weight, bias=self.head.bias)


class CallingWindows(Windows):
    def linear(self, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        own, layer._parameters["bias"] = layer._parameters["bias"], bias  # type: ignore[assignment]
        y: Tensor = layer(x)
        layer._parameters["bias"] = own
        return y


class CallingSwin(Swin):
    """The same network, whose code calls its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(CallingWindows(0), CallingWindows(2))

    def convolve(self, x: Tensor) -> Tensor:
        return self.patches(x)  # type: ignore[no-any-return]


def swins() -> tuple[Swin, CallingSwin, Tensor]:
    torch.manual_seed(0)
    made, twin = Swin().eval(), CallingSwin().eval()
    twin.load_state_dict(made.state_dict())
    return made, twin, torch.randn(3, 3, 16, 16)


WAYS: list[dict[str, Any]] = [
    {"recipe": "int4/g8"},
    {"recipe": "W8A8"},
    {"recipe": "W8A8_STATIC", "sequential": True},
    {"recipe": "palette4/row"},
    {"recipe": "int3/channel", "method": "gptq"},
    {"recipe": "int3/channel", "method": "gptq", "sequential": True},
    {"recipe": "palette3/row", "method": "skm", "loss": "classes"},
    {"recipe": "int4/channel/asym", "activation": "int8/static/asym", "tune": [{"name": "bounds", "iters": 4}]},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(str(part) for part in way.values() if part is not True))
@torch.no_grad()
def test_layers_are_seen_and_run_as_if_they_were_called(way: Any) -> None:
    made, twin, x = swins()
    found, expected = (network.quantize(one, inputs=[x], **way) for one in (made, twin))
    assert [record["name"] for record in found.layers] == [record["name"] for record in expected.layers]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one["activation"] == other["activation"] and one["tokens"] == other["tokens"]
        assert one["relative_error"] == other["relative_error"]
    assert torch.equal(found.network(x), expected.network(x))
    assert 0 < distance(found.network(x), made(x)) < 0.5


def dense(floating: nn.Module, made: network.Quantized) -> nn.Module:
    """The float network with what the layers of ``made`` stand for, and inputs rounded by the reference."""
    twin = copy.deepcopy(floating)
    for name, layer in made.network.named_modules():
        if isinstance(layer, Multiplier):
            old = twin.get_submodule(name)
            matrix = layer.weight_of().dequantize()
            old.weight = nn.Parameter(matrix.reshape(old.weight.shape))  # type: ignore[operator, arg-type]
            if (grid := layer.activation) is not None:
                old.register_forward_pre_hook(lambda _, args, grid=grid: (round_activations(args[0], grid),))
    return twin


def t5() -> tuple[T5ForConditionalGeneration, dict[str, Tensor]]:
    torch.manual_seed(0)
    made = T5ForConditionalGeneration(
        T5Config(
            vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    ids = torch.randint(2, 48, (3, 9))
    return made.eval(), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


@pytest.mark.parametrize("recipe", ["int4/g16", "W8A8", "palette4"])
@torch.no_grad()
def test_t5_asks_its_layers_for_dtypes(recipe: str, tmp_path: Path) -> None:
    floating, batch = t5()
    made = network.quantize(floating, recipe, inputs=[batch])
    assert len(made.layers) == 37  # 2 x (4 + 3) of the encoder, 2 x (8 + 3) of the decoder, the head
    found = made.network(**batch).logits
    # rounded inputs near the middle of a step may fall on either side of it
    limit = 1e-5 if recipe != "W8A8" else 0.02
    assert distance(found, dense(floating, made)(**batch).logits) < limit
    network.save(made, tmp_path / "out")
    again = network.load(tmp_path / "out", t5()[0])
    assert torch.equal(again(**batch).logits, found)
    assert again.generate(batch["input_ids"], max_new_tokens=3, do_sample=False).shape == (3, 4)


@torch.no_grad()
def test_copies_saved_cast_and_compiled_networks_multiply_so_as_well(tmp_path: Path) -> None:
    floating, _, x = swins()
    made = network.quantize(floating, "int4/g8", inputs=[x])
    found = made.network(x)
    network.save(made, tmp_path / "out")
    assert torch.equal(network.load(tmp_path / "out", Swin())(x), found)
    for twin in (copy.deepcopy(made.network), pickle.loads(pickle.dumps(made.network))):
        assert torch.equal(twin(x), found)
        twin.to(torch.bfloat16)
        assert twin.head.weight.dtype == twin.patches.weight.dtype == torch.bfloat16
        half = twin(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16 and distance(half.float(), found) < 0.05
    assert not any("like" in name for name in made.network.state_dict())
    assert {tuple(p.shape) for p in made.network.parameters()} == {(16,), (48,), (5,)}


class Heads(nn.Module):
    """Two heads of one weight; ``forward`` is the argument."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.code = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)  # type: ignore[no-any-return]


def heads(forward: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Heads(forward).eval(), torch.randn(4, 6)


@pytest.mark.parametrize("sequential", [False, True])
def test_other_uses_of_a_weight_are_refused_by_the_layers_name(sequential: bool) -> None:
    for code, asked in (
        (lambda self, x: x @ self.one.weight.t(), "asks for 't'"),
        (lambda self, x: x @ self.one.weight, "matmul"),
        (lambda self, x: F.linear(x, self.one.weight + 1), r"\+"),
        (lambda self, x: F.linear(x, F.normalize(self.one.weight)), "normalize"),
    ):
        made, x = heads(code)
        match = rf"quantizing one; .*{asked}.*torch\.nn\.functional\.linear takes them.*match = .one."
        with pytest.raises(UnsupportedError, match=match):
            network.quantize(made, "int8/channel", inputs=[x], sequential=sequential)


def test_a_bias_that_the_code_leaves_out_cannot_be_corrected() -> None:
    made, x = heads(lambda self, x: self.two(F.linear(x, self.one.weight)))
    assert distance(network.quantize(made, "int8/channel", inputs=[x]).network(x), made(x)) < 0.02
    with pytest.raises(UnsupportedError, match=r"bias of one; .*another bias.*correct_bias=False"):
        network.quantize(made, "int8/channel", inputs=[x], correct_bias=True)


def test_two_layers_of_one_weight_are_told_apart_by_their_biases_or_refused() -> None:
    made, x = heads(lambda self, x: F.linear(x, self.one.weight, self.one.bias) + 3 * self.two(x * x))
    made.two.weight = made.one.weight
    found = network.quantize(made, "W8A8_STATIC", inputs=[x])
    assert distance(found.network(x), made(x)) < 0.05
    assert len({record["activation"] for record in found.layers}) == 2
    made, x = heads(lambda self, x: F.linear(x, self.one.weight))
    made.two.weight = made.one.weight
    with pytest.raises(UnsupportedError, match="telling one and two apart; they share a weight"):
        network.quantize(made, "int8/channel", inputs=[x])


def test_norms_after_a_layer_that_is_not_called_stay() -> None:
    made, x = heads(lambda self, x: self.norm(F.linear(x, self.one.weight)) + self.two(x))
    made.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    found = network.quantize(made, "int8/channel", inputs=[x])
    assert not found.folded and distance(found.network(x), made(x)) < 0.02


@torch.no_grad()
def test_compiled_networks_multiply_so_as_well() -> None:
    made, x = heads(lambda self, x: self.two(F.linear(x, self.one.weight, self.one.bias)))
    run = network.quantize(made, "int8/channel", inputs=[x]).network
    assert torch.equal(torch.compile(run, backend="eager")(x), run(x))
