# SPDX-License-Identifier: Apache-2.0
"""Networks of convolutions and linear layers: norms folded, quantized, run by kernels, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fewbit
from fewbit import Recipe, methods, network
from fewbit.cli import app
from fewbit.core.correction import correction
from fewbit.core.facts import Facts
from fewbit.errors import CorruptFileError, InputError, SpecError, UnsupportedError
from fewbit.formats import parse
from fewbit.kernels.reference import round_activations, unfold
from fewbit.model.convolution import QuantConv2d, window_of
from fewbit.model.layers import QuantLinear
from fewbit.network.fold import distance, fold_norms


class Small(nn.Module):
    """A convolution, one in groups without a bias, a linear layer; norms behind each; a shortcut around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8, affine=False)
        self.middle, self.norm3 = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 5)
        self.apart = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = (self.norm2(self.second(x)) + x).relu().mean((2, 3))
        x = self.last(self.norm3(self.middle(x)).relu())
        y: Tensor = self.apart(x + 1)  # not on the layer's own output: stays
        return y


def small(seed: int = 0) -> tuple[Small, list[Tensor]]:
    """Norms with statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    made, batches = Small(), [torch.randn(6, 3, 7, 5) for _ in range(3)]
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
                if module.weight is not None:
                    module.weight.normal_()
                    module.bias.normal_()
    return made.eval(), batches


@torch.no_grad()
def test_folding_norms_does_not_move_the_output() -> None:
    made, (x, *_) = small()
    before = made.double()(x.double())
    folded = fold_norms(made, x)
    assert folded == {"norm1": "first", "norm2": "second", "norm3": "middle"}
    assert isinstance(made.norm2, nn.Identity) and isinstance(made.apart, nn.BatchNorm1d)
    torch.testing.assert_close(made(x.double()), before, rtol=1e-12, atol=1e-12)
    assert fold_norms(made, x) == {}


class Beside(nn.Module):
    """The convolution's own output is used beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y  # type: ignore[no-any-return]


def test_a_norm_that_cannot_be_folded_is_refused_and_nothing_has_changed() -> None:
    torch.manual_seed(1)
    made = Beside().eval()
    made.norm.running_var.fill_(5)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(UnsupportedError, match="moved"):
        fold_norms(made, torch.randn(1, 2, 3, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert network.quantize(made, "int8/channel", [torch.randn(1, 2, 3, 3)], fold=False).folded == {}


@torch.no_grad()
def stand_in(found: network.Quantized, made: Small, batches: list[Tensor]) -> Small:
    """The float network with what the layers decode to, and inputs rounded by hooks."""
    twin = copy.deepcopy(made).eval()
    fold_norms(twin, batches[0])
    for record in found.layers:
        layer, quant = twin.get_submodule(record["name"]), found.network.get_submodule(record["name"])
        layer.weight.copy_(quant.weight_of().dequantize().reshape(layer.weight.shape))  # type: ignore[operator]
        layer.bias.copy_(quant.bias)  # type: ignore[operator]
        if record["activation"]:
            grid = parse(record["activation"])
            layer.register_forward_pre_hook(lambda module, args, grid=grid: (round_activations(args[0], grid),))
    return twin


@pytest.mark.parametrize("recipe", ["int4/channel", "W8A8_STATIC", "palette3"])
@pytest.mark.parametrize("correct_bias", [False, True])
@torch.no_grad()
def test_what_runs_is_what_was_chosen_and_what_is_saved_loads(
    recipe: str, correct_bias: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    made, batches = small()
    found = network.quantize(made, recipe, batches, correct_bias=correct_bias)
    assert [record["name"] for record in found.layers] == ["first", "second", "middle", "last"]
    assert [entry["name"] for entry in found.skipped] == ["apart"]
    x = torch.randn(4, 3, 7, 5)
    y = found.network(x)
    assert distance(y, stand_in(found, made, batches)(x)) < 2e-5
    assert distance(y, made(x)) < (0.05 if recipe == "W8A8_STATIC" else 0.9)
    manifest = network.save(found, tmp_path / "out")
    assert manifest["bits_per_weight"] == found.bits_per_weight
    again = network.load(tmp_path / "out", Small())
    assert torch.equal(again(x), y)
    assert isinstance(again.first, QuantConv2d) and isinstance(again.last, QuantLinear)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert shown.exit_code == 0 and "apart" in shown.output
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == manifest["size_bytes"]


@pytest.mark.parametrize(
    ("recipe", "method", "options"),
    [
        ("sign/channel", "arb", {}),
        ("int1/channel/min", "ptq161", {}),
        ("vector2x3", "vptq", {"norm": "rows"}),
        ("vector2x3", "vptq", {"norm": "both", "outliers": 0.2, "outlier_bits": 1, "outlier_residual_bits": 1}),
    ],
)
@torch.no_grad()
def test_sums_of_terms_run_in_both_kinds_of_layers(
    recipe: str, method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made, batches = small()
    steps = [{"name": "scales", "iters": 4, "batch": 2}]
    found = network.quantize(made, recipe, batches, method=method, options=options, correct_bias=True, tune=steps)
    assert all("terms" in record and "by scales" in record["tuned"][0] for record in found.layers)
    x = torch.randn(4, 3, 7, 5)
    y = found.network(x)
    assert distance(y, stand_in(found, made, batches)(x)) < 2e-5
    network.save(found, tmp_path / "out")
    assert torch.equal(network.load(tmp_path / "out", Small())(x), y)
    asked = [{"match": "*", "format": recipe, "method": method, "options": options, "activation": "int8/static"}]
    for refused in (asked, [{**asked[0], "tune": ["rounding"]}]):
        with pytest.raises(UnsupportedError, match="first"):
            network.quantize(made, Recipe.from_dict({"rule": refused}), batches)


@pytest.mark.parametrize("sequential", [False, True])
def test_in_place_is_the_same_without_a_copy(sequential: bool) -> None:
    made, batches = small()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    copied = network.quantize(made, "W8A8_STATIC", batches, correct_bias=True, sequential=sequential)
    assert copied.network is not made
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    found = network.quantize(made, "W8A8_STATIC", batches, correct_bias=True, sequential=sequential, inplace=True)
    assert found.network is made and isinstance(made.first, QuantConv2d) and isinstance(made.last, QuantLinear)
    assert torch.equal(made(batches[0]), copied.network(batches[0]))


def test_static_grids_are_those_of_the_float_inputs() -> None:
    made, batches = small()
    found = network.quantize(made, Recipe.simple("int8/channel"), batches)
    assert all(record["activation"] is None for record in found.layers)
    found = network.quantize(made, "W8A8_STATIC", batches)
    inputs: list[Tensor] = []
    twin = copy.deepcopy(made)
    fold_norms(twin, batches[0])
    twin.second.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for batch in batches:
        twin(batch)
    from fewbit.core.observers import Seen

    expected = parse("int8/static/asym/mse").observed(Seen.of(torch.cat(inputs)))  # type: ignore[attr-defined]
    assert found.layers[1]["activation"] == expected.name and expected.name.endswith("/z0")  # behind a ReLU


@torch.no_grad()
def test_bias_correction_leaves_no_mean_error() -> None:
    made, batches = small()
    twin = copy.deepcopy(made)
    fold_norms(twin, batches[0])
    plain, corrected = (network.quantize(made, "int3/channel", batches, correct_bias=on) for on in (False, True))
    for name in ("first", "second", "middle", "last"):
        seen: list[Tensor] = []
        handle = twin.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        for batch in batches:
            twin(batch)
        handle.remove()
        x = torch.cat(seen)
        target = twin.get_submodule(name)(x)
        axes = [axis for axis in range(target.dim()) if axis != 1]
        off, left = (
            (made.network.get_submodule(name)(x) - target).mean(axes).abs().max() for made in (plain, corrected)
        )
        assert off > 1e-3 and left < 1e-5, name


def test_the_correction_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(6, 10, generator=generator), torch.randn(50, 10, generator=generator) + 2
    quantized = methods.rtn(weight, parse("int3/channel")).dequantize()
    facts = Facts.of(x)
    expected = x.double() @ weight.double().T - x.double() @ quantized.double().T
    found = correction(weight, quantized, facts.total / facts.tokens)
    torch.testing.assert_close(found.double(), expected.mean(0), rtol=1e-4, atol=1e-5)
    halves = torch.stack([x[:25].mean(0), x[25:].mean(0)])
    grouped = correction(weight, quantized, halves)
    assert torch.equal(grouped[:3], correction(weight[:3], quantized[:3], halves[0]))
    assert torch.equal(grouped[3:], correction(weight[3:], quantized[3:], halves[1]))
    with pytest.raises(InputError, match="bias correction"):
        correction(weight, quantized[:, :9], facts.total)


def test_methods_see_the_windows_of_a_convolution() -> None:
    torch.manual_seed(3)
    conv, x = nn.Conv2d(4, 6, 3, 2, 1), torch.randn(5, 4, 9, 9)
    found = network.quantize(nn.Sequential(conv), "int4/channel", [x[:2], x[2:]], method="gptq")
    window = window_of(conv)
    windows = unfold(x, window, 0, 5 * 25)
    facts = Facts.of(windows[: 2 * 25], gram=True).merge(Facts.of(windows[2 * 25 :], gram=True))
    expected = methods.gptq(conv.weight.detach().reshape(6, -1), parse("int4/channel"), facts)
    layer = found.network[0]  # type: ignore[index]
    assert torch.equal(layer.qtensor().dequantize(), expected.dequantize())
    assert 0 < found.layers[0]["relative_error"] < 0.2


@torch.no_grad()
def test_smooth_and_static_together_on_linear_layers() -> None:
    torch.manual_seed(4)
    made = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    x = torch.randn(200, 32)
    x[:, 5] *= 80
    plain, smoothed = (
        network.quantize(made, "W8A8_STATIC", [x], transforms=transforms) for transforms in ((), ("smooth",))
    )
    errors = [distance(found.network(x), made(x)) for found in (plain, smoothed)]
    assert errors[1] < errors[0] / 2
    assert smoothed.layers[0]["rewrites"][0]["kind"] == "scale"


def test_wrong_requests_say_what_would_work(tmp_path: Path) -> None:
    made, batches = small()
    with pytest.raises(InputError, match=r"first.*inputs=\[batch"):
        network.quantize(made, "W8A8_STATIC")
    with pytest.raises(InputError, match="inputs="):
        network.quantize(made, "int4/channel", method="gptq")
    with pytest.raises(UnsupportedError, match="convolutions"):
        network.quantize(made, "int8/channel", batches, transforms=["smooth"])
    with pytest.raises(UnsupportedError, match="quarot of a network"):
        network.quantize(made, "int8/channel", batches, transforms=["quarot"])
    with pytest.raises(SpecError, match="matches no layer"):
        network.quantize(made, Recipe.from_dict({"rule": [{"match": "nothing", "format": "int8"}]}))
    with pytest.raises(SpecError, match="float"):
        network.quantize(made, Recipe.from_dict({"rule": [{"match": "*", "format": "float"}]}))
    bad = batches[0].clone()
    bad[0, 0, 0, 0] = torch.nan
    for asked, options in (("W8A8_STATIC", {}), ("int8/channel", {}), ("int8/channel", {"method": "gptq"})):
        with pytest.raises(InputError, match=r"activations of first; 1 of 630 of its inputs are NaN"):
            network.quantize(made, asked, [bad], **options)
    found = network.quantize(made, "int8/channel", batches)
    network.save(found, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        network.save(found, tmp_path / "out")
    with pytest.raises(InputError, match=r"fewbit\.network\.load"):
        fewbit.load(tmp_path / "out")
    with pytest.raises(InputError, match="same class"):
        network.load(tmp_path / "out", nn.Sequential(nn.Linear(3, 3)))
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CorruptFileError, match="differ"):
        network.load(tmp_path / "out", Small())


def test_norms_stay_where_nobody_saw_what_they_follow() -> None:
    made, _ = small()
    found = network.quantize(made, "int8/channel")
    reasons = {entry["name"]: entry["reason"] for entry in found.skipped}
    assert "without inputs" in reasons["norm1"] and found.folded == {}


def test_groups_of_a_convolution_keep_outliers_in_float() -> None:
    torch.manual_seed(0)
    made = network.quantize(nn.Sequential(nn.Conv2d(8, 8, 3, groups=4)), "LLM_INT8")
    layer, x = made.network[0], 4 * torch.randn(2, 8, 6, 6)
    assert isinstance(layer, QuantConv2d) and layer.bias is not None
    windows = nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 4, 18)
    rounded = round_activations(windows.reshape(-1, 18), layer.activation).reshape(-1, 4, 18).double()
    weight = layer.weight_of().dequantize().reshape(4, 2, 18).double()
    expected = torch.einsum("tgc,goc->tgo", rounded, weight).reshape(2, 16, 8).transpose(1, 2).reshape(2, 8, 4, 4)
    with torch.no_grad():
        found = made.network(x).double() - layer.bias.double().reshape(8, 1, 1)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


class Patches(nn.Module):
    """Casts its input as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.out = nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x.to(self.patches.weight.dtype))
        return self.out(y.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_may_ask_for_the_dtype_of_a_convolutions_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, floating = torch.randn(2, 3, 8, 8), Patches().to(dtype)
    made = network.quantize(floating, "int8/channel", [x], sequential=True)
    found = made.network(x)
    assert found.dtype == dtype and made.network.patches.weight.shape == (8, 3, 4, 4)
    assert distance(found.float(), floating(x).detach().float()) < 0.03
    network.save(made, tmp_path / "out")
    assert torch.equal(network.load(tmp_path / "out", Patches().to(dtype))(x), found)
    assert made.network.to(torch.float16).patches.weight.dtype == torch.float16  # as the inputs of what is beside it
