# SPDX-License-Identifier: Apache-2.0
"""A large matrix is worked on some rows at a time, with the numbers of the whole at once and hardly more memory."""

from __future__ import annotations

import pytest
import torch

from fewbit import formats
from fewbit.core import format as F
from fewbit.core import room
from fewbit.core.qtensor import QTensor

FORMATS = [
    "int4/g64/asym",
    "int3/channel",
    "sign/g64",
    "nf4/g64/dq",
    "palette4",
    "palette3/rows16",
    "vector2x4",
    "ternary/g128",
]


@pytest.mark.parametrize("spelt", FORMATS)
@pytest.mark.parametrize("together", [1, 7 * 192, 64 * 192])
def test_rows_decoded_in_parts_are_those_of_the_whole(
    spelt: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    made = QTensor.rounded(formats.parse(spelt).bind(weight), weight)
    whole = made.dequantize()
    calls: list[int] = []
    decode = type(made.format).decode
    monkeypatch.setattr(F, "TOGETHER", together)
    monkeypatch.setattr(type(made.format), "decode", lambda *given: calls.append(len(given[1])) or decode(*given))
    assert torch.equal(made.dequantize(), whole)
    assert len(calls) > 1
    assert max(calls) * 192 <= max(together, 192 * made.format.height)


def test_gradients_go_through_parameters_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    made = QTensor.rounded(formats.parse("int4/g32").bind(weight), weight)
    codes, params = made.logical()
    monkeypatch.setattr(F, "TOGETHER", 64)
    scale = params["scale"].float().requires_grad_()
    F.decode(made.format, codes, {**params, "scale": scale}).sum().backward()
    assert scale.grad is not None and scale.grad.abs().sum() > 0


@pytest.mark.parametrize("together", [1, 5 * 40, 1 << 20])
def test_products_in_parts_are_those_of_the_whole(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, one, other = (torch.randint(-9, 9, (rows, 40), generator=generator).float() for rows in (3, 33, 33))
    monkeypatch.setattr(room, "TOGETHER", together)
    assert torch.equal(room.times(x, torch.sub, one, other), x @ (one - other).T)
    assert torch.equal(room.times(x, torch.abs, one), x @ one.abs().T)
