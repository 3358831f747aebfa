# SPDX-License-Identifier: Apache-2.0
"""Learned rounding against the definition in float64, and what it starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core import format as F
from fewbit.core.descent import SignSGD
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.methods.autoround import CLOSE, Rounding, Weights
from oracle.autoround_oracle import Block

FORMATS = ("int2/g8/asym", "int3/g8/asym", "int4/g8/sym", "int2/g8/sym", "int3/g8/min")
RATE = 0.05


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learnable(weight: Tensor, spelling: str, method: str = "rtn") -> tuple[Rounding, QTensor]:
    facts = Facts.of(normal(200, weight.shape[1], seed=9) @ normal(weight.shape[1], weight.shape[1], seed=8), gram=True)
    start = methods.named(method)(weight, formats.parse(spelling), facts)
    return Rounding(weight, start), start


def blocks_of(
    learner: Rounding, values: dict[str, Tensor], weight: Tensor, start: QTensor
) -> dict[tuple[int, int], Block]:
    """The oracle's view of the layer at ``values``."""
    format = start.format
    first, now = format.physical(start.logical()[1]), format.physical(learner.freeze(values).logical()[1])
    found = {}
    for row in range(weight.shape[0]):
        for block in range(weight.shape[1] // 8):
            last, symmetric = format.levels - 1, format.name.endswith("sym") and not format.name.endswith("asym")
            scale, offset = float(first.scale[row, block]), float(first.offset[row, block])
            reach = abs(scale) * last
            low, high = (-reach / 2, reach / 2) if symmetric else (offset, offset + reach)
            found[row, block] = Block(
                weight[row, 8 * block : 8 * block + 8].double().numpy(),
                low,
                high,
                float(now.scale[row, block]),
                float(now.offset[row, block]),
                format.levels,
                symmetric,
                float(np.sign(scale)),
            )
    return found


@pytest.mark.parametrize(
    ("spelling", "method"), [*((one, "rtn") for one in FORMATS), ("int4/g8/sym", "clip"), ("int2/g8/sym", "autoround")]
)
def test_values_and_gradient_are_those_of_the_definition(spelling: str, method: str) -> None:
    weight, grad = normal(3, 16), normal(3, 16, seed=1)
    learner, start = learnable(weight, spelling, method)
    assert bool((start.params["scale"] < 0).any()) == (method != "rtn"), "a search turns some symmetric grids around"
    generator = torch.Generator().manual_seed(2)
    values = {
        "offset": torch.rand(3, 2, 8, generator=generator) - 0.5,
        "low": 0.6 + 0.3 * torch.rand(3, 2, 1, generator=generator),
        "high": 0.6 + 0.3 * torch.rand(3, 2, 1, generator=generator),
    }
    found, got = learner.gradient(values, grad), learner.weight(values)
    assert torch.equal(got, learner.freeze(values).dequantize()), "the loss must see what is stored"
    clipped = 0
    for (row, block), one in blocks_of(learner, values, weight, start).items():
        columns = slice(8 * block, 8 * block + 8)
        v = values["offset"][row, block].double().numpy()
        beta, gamma = float(values["low"][row, block]), float(values["high"][row, block])
        np.testing.assert_allclose(got[row, columns].double().numpy(), one.values(v), rtol=1e-6, atol=1e-6)
        by_v, by_beta, by_gamma = one.gradient(v, beta, gamma, grad[row, columns].double().numpy())
        clipped += int((one.codes(v) != np.clip(one.codes(v), 0, one.levels - 1)).sum())
        # the quotient is off by about 1e-9 of the magnitudes, float32 by 1e-6 of them
        np.testing.assert_allclose(found["offset"][row, block].double().numpy(), by_v, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(float(found["low"][row, block]), by_beta, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(float(found["high"][row, block]), by_gamma, rtol=1e-4, atol=1e-4)
    assert clipped, "no weight lay beyond the ends: half of the definition was not tried"


def test_one_step_is_the_step_written_by_hand() -> None:
    """Loss |X (w - W)|^2 of a layer; V, beta and gamma go by the sign of the oracle's gradient, then back in bounds."""
    weight, x = normal(3, 16), normal(40, 16, seed=5)
    learner, start = learnable(weight, "int2/g8/asym")
    values = {name: array.clone() for name, array in learner.start.items()}
    grad = 2 * (learner.weight(values) - weight) @ (x.T @ x)
    expected = {name: array.double().numpy().copy() for name, array in values.items()}
    for (row, block), one in blocks_of(learner, values, weight, start).items():
        columns = slice(8 * block, 8 * block + 8)
        steps = one.gradient(expected["offset"][row, block], 1.0, 1.0, grad[row, columns].double().numpy())
        for name, step in zip(("offset", "low", "high"), steps, strict=True):
            expected[name][row, block] -= RATE * np.sign(np.where(np.abs(step) < 1e-5, 0, step))
    rule = SignSGD()
    for name, found in learner.gradient(values, grad).items():
        rule.step(name, values[name], torch.where(found.abs() < 1e-5, 0, found), RATE)
        values[name].clamp_(*learner.bounds[name])
        low, high = learner.bounds[name]
        np.testing.assert_allclose(values[name].double().numpy(), np.clip(expected[name], low, high), atol=1e-6)


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
@pytest.mark.parametrize(
    "spelling", [*FORMATS, "int4/g4x2/asym/s6", "int3/g4x2/sym/s8", "int8/channel/asym", "int1/g8/asym"]
)
def test_it_starts_where_the_method_ended(spelling: str, method: str) -> None:
    for columns in (16, 13):  # whole blocks, and a shorter last one
        weight = normal(4, columns, seed=3)
        learner, start = learnable(weight, spelling, method)
        again = learner.freeze(learner.start)
        assert torch.equal(again.packed, start.packed)
        assert torch.equal(learner.weight(learner.start), start.dequantize())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_start_off_the_brink_and_go_far(method: str) -> None:
    """A quarter of a step off their level where another is nearer, so that small moves change none of these; and to any
    level in the end."""
    weight = normal(4, 16)
    _, start = learnable(weight, "int3/g8/asym", method)
    learner, codes = Weights(weight, start), start.logical()[0].int()
    values = {name: array.clone() for name, array in learner.start.items()}
    assert torch.equal(learner.weight(values), start.dequantize())
    far = F.encode(start.format, weight, start.logical()[1]).int() != codes
    assert bool(far.any()) == (method == "gptq")
    values["offset"] += 0.9 * (0.5 - CLOSE)
    assert torch.equal(learner.freeze(values).logical()[0].int()[far], codes[far])
    values["offset"] += 3
    found = learner.freeze(values).logical()[0].int()
    assert bool((found - codes == (codes + 3).clamp_max(7) - codes).sum() > found.numel() // 2)
    assert learner.bounds["offset"][1] > 7 and learner.bounds["low"][1] > 1


@pytest.mark.parametrize("spelling", ["int4/g8/asym", "int4/g8/sym", "int4/g4x4/asym/s6"])
def test_rows_are_independent_of_their_chunk(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grad = normal(13, 40), normal(13, 40, seed=1)
    learner, _ = learnable(weight, spelling)
    values = {name: array - 0.2 * torch.rand_like(array) for name, array in learner.start.items()}
    whole = {"weight": learner.weight(values), **learner.gradient(values, grad)}
    monkeypatch.setattr("fewbit.methods.ranges.CHUNK", 5 * 40)
    parts = {"weight": learner.weight(values), **learner.gradient(values, grad)}
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_padding_learns_nothing() -> None:
    learner, _ = learnable(normal(4, 13), "int3/g8/asym")
    found = learner.gradient(learner.start, torch.ones(4, 13))
    assert float(found["offset"][:, 1, 5:].abs().max()) == 0
    assert float(found["offset"][:, 1, :5].abs().max()) > 0


@pytest.mark.parametrize(
    "spelling", ["nf4/g64", "palette4", "sign/g64", "ternary/g64", "int1/g64/sym", "mxfp4", "vector8x12"]
)
def test_grids_that_are_not_evenly_spaced_are_refused(spelling: str) -> None:
    assert methods.named("autoround").refuse(formats.parse(spelling))
