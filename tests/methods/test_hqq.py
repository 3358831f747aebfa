# SPDX-License-Identifier: Apache-2.0
"""HQQ against its oracle, its law, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewbit
from fewbit import formats, methods
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.methods import hqq, ranges, rtn
from fewbit.methods.hqq import shrink
from oracle.hqq_oracle import hqq_oracle

GOLDEN = Path(__file__).parent.parent / "golden" / "peers.npz"
MOVABLE = ("int4/g8/min", "int3/g16/min", "int2/channel/min", "int5/g32/min")


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """Weights with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.where(torch.rand(rows, columns, generator=generator) < 0.05, 6.0, 1.0)


def by_block(error: Tensor, format: F.Format) -> Tensor:
    """Sum of |error| over every block, (rows, blocks)."""
    return B.split(error.abs(), format.block).sum(-1)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("size", [0.05, 3.0])
@pytest.mark.parametrize("name", ["int4/g16/min", "int3/g16/min", "int2/channel/min"])
def test_equals_the_oracle(name: str, size: float, iterations: int) -> None:
    """At the size of usual weights nothing survives the shrinking; three times a unit Gaussian, much does.

    The mean that moves the minimum is summed in float32, so each round it may fall to the neighbouring float16, and
    after many of them only what is lost is compared.
    """
    options = {"p": 0.7, "beta": 10.0, "kappa": 1.5, "iterations": iterations}
    weight, format = normal(6, 40, seed=4) * size, formats.parse(name)
    fitted, width = F.fit(format, weight), format.block or 40
    places = [(row, block) for row in range(6) for block in range(B.count(40, format.block))]
    asked = [
        (
            weight[row, block * width : (block + 1) * width].numpy(),
            *(float(fitted[key][row, block, 0]) for key in ("scale", "minimum")),
        )
        for row, block in places
    ]
    found = hqq(weight, format, **options)
    wanted, least, rounds, margin = hqq_oracle(asked, format.levels, **options)
    assert rounds > 0, "the case is too easy"
    assert math.isclose(float((weight - found.dequantize()).abs().sum()), least, rel_tol=0.005)
    if iterations <= 2:
        assert margin > 1e-4, "rounding decides this case"
        for (row, block), minimum in zip(places, wanted, strict=True):
            got = float(found.params["minimum"][row, block, 0])
            assert abs(got - minimum) <= rounds * abs(float(np.spacing(np.float16(minimum))))


@pytest.mark.parametrize("bits", [4, 2])
def test_what_the_package_hqq_loses(bits: int) -> None:
    """Its default solver, whose penalty does not grow: 20 rounds, of weights so large that shrinking decides. Minima of
    float16, and what is kept of the last round, make the difference."""
    with np.load(GOLDEN, allow_pickle=False) as data:
        weight, values = (torch.from_numpy(data[f"hqq{bits}.{key}"]).float() for key in ("weight", "values"))
    format = formats.parse(f"int{bits}/g64/min")
    found = hqq(weight, format, kappa=1.0).dequantize()
    lost = [float((one - weight).abs().mean()) for one in (found, values, rtn(weight, format).dequantize())]
    assert lost[0] == pytest.approx(lost[1], rel=0.005) and lost[2] > 1.2 * lost[1]


def test_shrinking_is_what_makes_outliers_not_count() -> None:
    """``|x| - |x|^(p-1) / beta``, nothing below beta^(1 / (p-2)), odd."""
    x = torch.tensor([-2.0, -0.1, 0.0, 0.1, 0.17, 0.18, 2.0], dtype=torch.float64)
    expected = [math.copysign(max(abs(v) - abs(v) ** -0.3 / 10, 0), v) if v else 0.0 for v in x.tolist()]
    assert torch.allclose(shrink(x, 0.7, 10.0), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert shrink(x, 0.7, 10.0)[1:5].eq(0).all() and shrink(x, 0.7, 10.0)[5] > 0


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(MOVABLE), rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_never_worse_than_rounding(name: str, rows: int, columns: int, seed: int) -> None:
    weight, format = normal(rows, columns, seed), formats.parse(name)
    lost = float((weight - hqq(weight, format).dequantize()).abs().sum(dtype=torch.float64))
    plain = float((weight - rtn(weight, format).dequantize()).abs().sum(dtype=torch.float64))
    assert lost <= plain * (1 + 2 * columns * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", ["int4/g64/min", "int3/g64/min", "int2/g16/min"])
def test_most_blocks_move_and_lose_less(name: str) -> None:
    weight, format = normal(32, 512, seed=1), formats.parse(name)
    lost = by_block(weight - hqq(weight, format).dequantize(), format)
    plain = by_block(weight - rtn(weight, format).dequantize(), format)
    assert float((lost < plain).float().mean()) > 0.5


def test_without_rounds_it_is_rounding() -> None:
    weight, format = normal(3, 24, seed=1), formats.parse("int3/g8/min")
    moved, plain = hqq(weight, format, iterations=0), rtn(weight, format)
    assert torch.equal(moved.packed, plain.packed)
    assert all(torch.equal(values, plain.params[key]) for key, values in moved.params.items())


def test_rows_are_independent_of_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = normal(9, 24, seed=2), formats.parse("int3/g8/min")
    whole = hqq(weight, format)
    monkeypatch.setattr(ranges, "CHUNK", 50)
    parts = hqq(weight, format)
    assert torch.equal(whole.packed, parts.packed)
    assert all(torch.equal(values, parts.params[key]) for key, values in whole.params.items())


@pytest.mark.parametrize("value", [0.0, 0.7, -1000.3, 3e38, 1e-41])
@pytest.mark.parametrize("name", MOVABLE)
def test_hostile_weights_give_numbers(name: str, value: float) -> None:
    weight = torch.full((2, 40), value)
    weight[1, 7] = 1e6
    assert bool(hqq(weight, formats.parse(name)).dequantize().isfinite().all())


def test_what_it_cannot_use_is_refused() -> None:
    weight = normal(2, 16, seed=0)
    for name in ("int4/g8/asym", "int4/g8/sym", "nf4/g8", "vector4x4", "int4/g4x4/asym/s6"):
        with pytest.raises(UnsupportedError, match=r"hqq to .*offset"):
            hqq(weight, formats.parse(name))
    for options in ({"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": -1}):
        with pytest.raises(SpecError, match="hqq with"):
            hqq(weight, formats.parse("int4/g8/min"), **options)
    weight[1, 3] = math.nan
    with pytest.raises(InputError, match="NaN"):
        hqq(weight, formats.parse("int4/g8/min"))


def test_the_plan_refuses_what_the_method_refuses(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"int4/g32/asym by hqq for .*offset.*methods rtn, clip, laq, imatrix"):
        fewbit.plan(tiny, "int4/g32/asym", method="hqq")
    with pytest.raises(UnsupportedError, match=r"vector8x8 by gptq for .*8 weights.*rtn"):
        fewbit.plan(tiny, "vector8x8", method="gptq")
    assert {d.rule.method for d in fewbit.plan(tiny, "int4/g32/min", method="hqq").decisions if d.rule} >= {"hqq"}


def test_every_format_says_whether_it_can_be_moved() -> None:
    """``free_offset`` and ``with_offset`` agree, and what is asked for is had, rounded to float16."""
    weight = normal(3, 64, seed=5)
    for name in formats.EXAMPLES:
        format = formats.parse(name).bind(weight)
        params = F.fit(format, weight)
        if not format.free_offset:
            with pytest.raises(UnsupportedError, match="offset"):
                format.with_offset(params, torch.zeros(3, 1, 1))
            assert methods.named("hqq").refuse(format)
            continue
        offset = format.physical(params).offset
        assert offset is not None
        asked = offset.unsqueeze(-1) * 0.9
        got = format.physical(format.with_offset(params, asked)).offset
        assert got is not None
        assert ((got.unsqueeze(-1) - asked).abs() <= asked.abs() * 2.0**-11).all()


@pytest.mark.parametrize("p", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("by", [0.5, 1 - 1e-6, 1 + 1e-6, 2.0])
def test_shrinking_below_the_size_that_survives_is_the_formula_too(p: float, by: float) -> None:
    largest = by * 10.0 ** (1 / (p - 2))
    x = torch.linspace(-largest, largest, 1001)
    expected = x.sign() * (x.abs() - x.abs() ** (p - 1) / 10.0).clamp_min(0)
    assert torch.equal(shrink(x, p, 10.0), expected)
    assert bool(shrink(x, p, 10.0).any()) == (by > 1)
