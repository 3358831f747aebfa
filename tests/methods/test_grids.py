# SPDX-License-Identifier: Apache-2.0
"""Compiled engines for even grids and tables give the bits of the plain ones, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbit import formats
from fewbit.core import compiled, passes
from fewbit.core import format as F
from fewbit.core.facts import Facts
from fewbit.core.format import Format, Params
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError
from fewbit.kernels import native
from fewbit.methods import feedback, grids, objective, ranges
from fewbit.methods.gptq import ROUNDING
from fewbit.methods.rtn import rtn

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

SPELT = [
    "int4/g32/asym",
    "int4/g32/sym",
    "int3/g64/asym",
    "int2/g128/sym",
    "int8/channel/asym",
    "int5/g7/sym",
    "int1/g31/asym",
]
TABLES = ["nf4/g64", "nf4/channel", "nf4/g64/dq", "fp4/g7", "pot2/g31", "pot8/g32", "mxfp4", "nvfp4"]
SHAPES = [(1, 1), (7, 31), (33, 97), (40, 130)]
ISAS = [isa for isa in ("serial", "avx2") if isa in native.isas()]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(compiled, "BEST", native.FLAGS[request.param])
    return str(request.param)


def unaligned(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.reshape(-1)])[1:].view(values.shape)


def weight(shape: tuple[int, int]) -> Tensor:
    """With a row of zeros and one of large values."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])) * 0.1
    made[0], made[-1] = 0, made[-1] * 1e7
    return unaligned(made)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelt", SPELT + TABLES)
def test_ranges_are_those_of_the_search_in_torch(
    spelt: str, shape: tuple[int, int], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, ratios = weight(shape), ranges.grid(24, 0.4)
    format = formats.parse(spelt).bind(values)
    some = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for worth in (None, unaligned(some), torch.where(torch.arange(shape[1]) < 64, 0, some)):
        monkeypatch.setattr(compiled, "grids", lambda: native.core())
        fast = ranges.search(format, values, worth, ratios)
        monkeypatch.setattr(compiled, "grids", lambda: None)
        plain = ranges.search(format, values, worth, ratios)
        assert fast.keys() == plain.keys()
        for name, found in fast.items():
            assert found.dtype == plain[name].dtype
            assert torch.equal(found, plain[name]), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelt", SPELT)
def test_rounding_gives_the_bits_of_torch(spelt: str, shape: tuple[int, int], isa: str) -> None:
    values, format = weight(shape), formats.parse(spelt)
    params = F.fit(format, values)
    codes = F.encode(format, values, params)
    found = QTensor.rounded(format, values)
    assert torch.equal(found.packed, codes) and found.packed.dtype == codes.dtype
    assert found.params.keys() == params.keys()
    for name, each in found.params.items():
        assert torch.equal(each, params[name]) and each.dtype == params[name].dtype, name
    wider = {**params, "scale": (params["scale"] * -2).clamp_min(-65504)}
    found = QTensor.nearest(format, values, wider)
    assert torch.equal(found.packed, F.encode(format, values, wider))
    assert found.lost == passes.squares(format, *found.logical(), values)


def test_quotients_are_rounded_as_divisions_are(isa: str) -> None:
    """Weights next to the middle between two codes, under every scale that float16 has below 2."""
    format = formats.parse("int8/channel/asym")
    scale = torch.arange(1, 0x4000, dtype=torch.int16).view(torch.float16).reshape(-1, 1, 1)
    middles = (torch.rand(len(scale), 64, generator=torch.Generator().manual_seed(1)) * 255).floor() + 0.5
    values = (middles * scale[:, 0].double()).float()
    values = torch.cat([values, values.nextafter(torch.tensor(9.0)), values.nextafter(torch.tensor(-9.0)), -values], 1)
    params = {"scale": scale, "zero_point": torch.zeros(len(scale), 1, 1, dtype=torch.uint8)}
    assert torch.equal(QTensor.nearest(format, values, params).packed, F.encode(format, values, params))


def test_what_overflows_a_quotient_takes_the_first_or_last_code(isa: str) -> None:
    format, values = formats.parse("int4/g32/asym"), torch.tensor([[3e38, -3e38, 1e33, -1e33] * 8])
    params = {
        "scale": torch.full((1, 1, 1), 2.0**-24).half(),
        "zero_point": torch.full((1, 1, 1), 7, dtype=torch.uint8),
    }
    assert torch.equal(QTensor.nearest(format, values, params).packed, torch.tensor([[15, 0] * 16], dtype=torch.uint8))


def test_a_block_of_zeros_in_a_file_has_a_scale_of_zero() -> None:
    """There 1 is divided by, as in torch: no code is NaN's."""
    format, values = formats.parse("int4/g32/asym"), weight((3, 64))
    params = {
        "scale": torch.zeros(3, 2, 1, dtype=torch.float16),
        "zero_point": torch.full((3, 2, 1), 7, dtype=torch.uint8),
    }
    assert torch.equal(QTensor.nearest(format, values, params).packed, F.encode(format, values, params))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelt", [*SPELT, *TABLES, "int4/g64/min", "int3/g16x16/asym", "palette3/row", "int1/g32/sym"])
def test_squares_are_those_of_float64(spelt: str, shape: tuple[int, int], isa: str) -> None:
    values = weight(shape)[:-1] if shape[0] > 1 else weight(shape) + 0.1
    made = QTensor.rounded(formats.parse(spelt).bind(values), values)
    lost, whole = made.squares(values)
    exact = (made.dequantize().double() - values.double()).square().sum()
    noise = 2e-7 * values.double().square().sum().sqrt()  # what decoding in float32 is off by, at most
    assert lost**0.5 == pytest.approx(float(exact.sqrt()), rel=1e-5, abs=float(noise))
    assert whole == pytest.approx(float(values.double().square().sum()), rel=1e-5)


def swept(values: Tensor, format: Format, params: Params, passing: feedback.Feedback) -> Tensor:
    """Codes (rows, columns): each column rounded once all errors before it were passed on, one by one."""
    at = {
        name: each.repeat_interleave(format.block or values.shape[1], 1)[:, : values.shape[1]]
        for name, each in params.items()
    }
    codes, left = torch.empty_like(values, dtype=torch.uint8), values[:, passing.order].clone()
    for k, column in enumerate(passing.order.tolist()):
        here = {name: each[:, column : column + 1] for name, each in at.items()}
        code, chosen = format.nearest(left[:, k].reshape(-1, 1, 1), here)
        codes[:, column] = code.reshape(-1).to(torch.uint8)
        lost = values[:, column] - chosen.reshape(-1)
        left[:, k + 1 :] += lost.unsqueeze(1) * passing.coefficients[k, k + 1 :]
    return codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spelt", SPELT)
def test_a_sweep_rounds_each_column_to_the_bit(spelt: str, shape: tuple[int, int], isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    values, format = weight(shape)[: shape[0] - 1 or 1], formats.parse(spelt)
    mixed = torch.randn(shape[1], shape[1], generator=generator)
    facts = Facts.of(torch.randn(50, shape[1], generator=generator) @ mixed, gram=True)
    passing = feedback.factorize(facts.second_moment, 0.01, by_activity=True)
    params = ranges.search(format, values, facts.mean_square, ranges.grid(24, 0.4))
    columns = grids.Columns.of(format, values.shape, params, passing)
    assert columns is not None
    batch = compiled.SWEPT  # the first batch takes no product in other order
    most = feedback.sweep_by_batches(values, passing, columns.round, batch)
    found, expected = columns.qtensor(), swept(values, format, params, passing)
    first = passing.order[:batch]
    assert torch.equal(found.packed[:, first], expected[:, first])
    assert torch.equal(found.dequantize().T[first], F.decode(format, expected, params).T[first])
    lost = (values - found.dequantize()).double()
    exact = ((lost @ feedback.damped(facts.second_moment, passing).double()) * lost).sum(1)
    assert torch.allclose(most.double(), exact, rtol=ROUNDING, atol=0)
    assert (objective.row_errors(lost, facts) <= most * (1 + ROUNDING)).all()


def test_batches_longer_than_a_call_are_cut(isa: str) -> None:
    """Two calls in a batch, or two batches: in between stand the same products."""
    values, format = weight((40, 300)), formats.parse("int4/g32/asym")
    facts = Facts.of(torch.randn(900, 300, generator=torch.Generator().manual_seed(3)), gram=True)
    passing = feedback.factorize(facts.second_moment, 0.01)
    params = ranges.search(format, values, None, ranges.grid(24, 0.4))
    found = []
    for batch in (compiled.SWEPT, 2 * compiled.SWEPT):
        columns = grids.Columns.of(format, values.shape, params, passing)
        assert columns is not None
        feedback.sweep_by_batches(values, passing, columns.round, batch)
        found.append(columns.qtensor().packed)
    assert (found[0] != found[1]).float().mean() < 1e-3


def test_other_formats_are_left_to_torch() -> None:
    for spelt in ("nf4/g64", "int4/g64/min", "int8/channel/sym/clip0.9", "int1/g32/sym"):
        format = formats.parse(spelt)
        assert grids.search(format, weight((3, 64)), torch.ones(64), (1.0, 0.5)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rounding_refuses_what_is_not_finite(value: float, isa: str) -> None:
    """Which the pass that rounds finds; and takes weights whose squares overflow a float32."""
    values, format = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)), formats.parse("int4/g32/asym")
    values[2, 3] = value
    with pytest.raises(InputError, match=r"1 entries are NaN or infinite, first weight\[2, 3\]"):
        rtn(values, format)
    values[2, 3] = 1e30
    assert rtn(values, format).packed.shape == (5, 96)
