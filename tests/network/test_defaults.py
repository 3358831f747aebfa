# SPDX-License-Identifier: Apache-2.0
"""What torch was told to use by default, or under autocast, changes no bit of a quantized network; the network itself
still sees its defaults."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit import Recipe, network

Unusual = Callable[[], AbstractContextManager[None]]
STATIC: dict[str, Any] = {"activation": "int8/static", "correct_bias": True, "sequential": True}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "billm": ("sign/g16", "billm", {}),
    "nanoquant": ("sign/channel", "nanoquant", {"options": {"bits": 2.0, "iterations": 3}, "loss": "values"}),
    "gptq": ("int4/channel", "gptq", STATIC),
    "rtn": ("int3/channel", "rtn", {"tune": [{"name": "bounds", "iters": 2}], "activation": "int8/static"}),
    "rotated": ("int4/g16", "gptq", {"transforms": ["hadamard"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_networks_are_equal(case: str, unusual: Unusual) -> None:
    torch.manual_seed(0)
    linear = [nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8)]
    front = [] if case == "rotated" else [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    small = nn.Sequential(*front, nn.Flatten(), *linear).eval()
    batches = [torch.randn(20, *((32,) if case == "rotated" else (2, 4, 4))) for _ in range(2)]
    format, method, more = CASES[case]

    def made() -> dict[str, Tensor]:
        return network.quantize(small, format, batches, method=method, **more).network.state_dict()

    expected = made()
    with unusual():
        found = made()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == kept.dtype and torch.equal(found[name], kept) for name, kept in expected.items())


@pytest.mark.parametrize("how", [{"method": "autoround", "options": {"iters": 2}}, {"method": "skm", "loss": "values"}])
def test_what_learns_does_so_in_inference_mode(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small, batches = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), [torch.randn(20, 32)]
    format = "int4/g16" if how["method"] == "autoround" else "palette2/row"
    expected = network.quantize(small, format, batches, **how).network.state_dict()
    with torch.inference_mode():
        found = network.quantize(small, format, batches, **how).network
    assert all(torch.equal(found.state_dict()[name], kept) for name, kept in expected.items())
    assert found(batches[0].clone().requires_grad_()).requires_grad


class Reliant(nn.Module):
    """Of 16 bits, with a shift in the default dtype: of 32 bits, its sum would be of 32, and the layer refuse it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, dtype=torch.bfloat16), nn.Linear(16, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) + torch.linspace(0, 1, 16))
        return y


@pytest.mark.parametrize("more", [{}, STATIC, {"method": "skm", "loss": "values"}])
def test_a_network_may_rely_on_its_defaults(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    reliant, x = Reliant(), torch.randn(20, 16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        expected = reliant(x.bfloat16()).float()
        format = "palette4/row" if "method" in more else "int8/channel"
        found = network.quantize(reliant, format, [x], **more).network(x.bfloat16()).float()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_network_is_loaded_in_its_own_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> nn.Module:
        layers = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8)
        return nn.Sequential(*layers).to(dtype).eval()

    float_front = Recipe.from_dict(
        {"rule": [{"match": "kind:conv2d", "format": "float"}, {"match": "*", "format": "int4/channel"}]}
    )
    x = torch.randn(20, 2, 4, 4).to(dtype)
    made, again = network.quantize(build(), float_front, [x]), build()
    network.save(made, tmp_path / "out")
    torch.set_default_dtype(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    try:
        network.load(tmp_path / "out", again)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again(x), made.network(x))
