# SPDX-License-Identifier: Apache-2.0
"""The clipping search: exact over its grid, never worse than rounding, and blind to padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit import formats
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.facts import Facts
from fewbit.errors import SpecError
from fewbit.methods import clip, objective, ranges, rtn

FORMATS = (
    "int4/g8/asym",
    "int3/g8/sym",
    "int2/channel/asym",
    "int1/g8/sym",
    "int4/g8/min",
    "int3/g4x2/sym/s6",
    "int4/g4x4/asym/s6",
    "nf4/g8",
    "pot3/g8",
    "mxfp4",
    "nvfp4",
    "sign/g8",
    "ternary/g8",
)


def case(rows: int, columns: int, seed: int) -> tuple[Tensor, Facts]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), Facts.of(x)


def spans(errors: Tensor, format: F.Format) -> Tensor:
    """(rows, columns) -> sums over what is fitted together, (rows, spans)."""
    return B.split(errors, format.fit_block).sum(-1)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(FORMATS), rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_never_worse_than_rounding_in_any_span(name: str, rows: int, columns: int, seed: int) -> None:
    weight, facts = case(rows, columns, seed)
    format = formats.parse(name)
    worth = facts.mean_square
    lost = spans((weight - clip(weight, format, facts).dequantize()).square() * worth, format)
    plain = spans((weight - rtn(weight, format).dequantize()).square() * worth, format)
    # Both sums are taken in float32 in different orders: each is off by at most its terms times eps.
    assert (lost <= plain * (1 + 2 * columns * torch.finfo(torch.float32).eps)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_is_the_best_of_the_grid_span_by_span(name: str) -> None:
    """Brute force in float64: every span quantized alone with every ratio."""
    weight, facts = case(5, 21, seed=3)
    format = formats.parse(name).bind(weight)
    ratios = ranges.grid(7, 0.4)
    params = ranges.search(format, weight, facts.mean_square, ratios)
    values = F.decode(format, F.encode(format, weight, params), params)
    width = format.fit_block or 21
    for row in range(5):
        for first in range(0, 21, width):
            part = weight[row : row + 1, first : first + width]
            worth = facts.mean_square[first : first + width]
            candidates = [F.fit(format, part)]
            for ratio in ratios:
                if format.grid == "magnitude":  # the largest weight of a block on the level that has no counterpart
                    blocks = B.split(part, format.block)
                    most = torch.where(blocks.amax(-1) > -blocks.amin(-1), blocks.amax(-1), blocks.amin(-1))
                    scale = (-ratio * most / (format.levels / 2)).unsqueeze(-1)
                    candidates.append(format.placed(scale, torch.zeros_like(scale)))
                else:
                    candidates.append(F.fit(format, part * ratio, worth))
            errors = []
            for candidate in candidates:
                near = F.decode(format, F.encode(format, part, candidate), candidate)
                errors.append(float(((part - near).double().square() * worth).sum()))
            got = float(((part - values[row, first : first + width]).double().square() * worth).sum())
            assert math.isclose(got, min(errors), rel_tol=1e-5, abs_tol=1e-12)


def least_of_a_gaussian(codes: Tensor) -> float:
    """Mean square error of a unit Gaussian on ``step * codes``, float64, at the step that makes it least."""
    points = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    density = torch.exp(-points.square() / 2)
    density /= density.sum()
    errors = []
    for step in torch.linspace(0.1, 1.6, 1501, dtype=torch.float64):
        near = step * ((points / step - codes[0]).round().clamp(0, len(codes) - 1) + codes[0])
        errors.append(float(((points - near).square() * density).sum()))
    return min(errors)


@pytest.mark.parametrize(
    ("name", "first", "known"),
    [
        ("int2/channel/sym", -2.0, 0.1494),
        ("int3/channel/sym", -4.0, 0.0406),
        ("int4/channel/sym", -8.0, 0.0119),
        ("int2/channel/min", -1.5, 0.1189),
        ("int3/channel/min", -3.5, 0.0374),
        ("int4/channel/min", -7.5, 0.0115),
    ],
)
def test_ranges_of_a_gaussian_are_the_best_uniform_ones(name: str, first: float, known: float) -> None:
    """Codes {-2 .. 1} and alike have a level at zero, those with a float minimum none: of the best step both lose what
    is known. One range for 100,000 weights, from a grid fine enough to come near; both ends of a minimum's shrink
    alike, though the sample's lie unevenly."""
    codes = first + torch.arange(1 << int(name[3]), dtype=torch.float64)
    assert least_of_a_gaussian(codes) == pytest.approx(known, rel=0.005)
    weight = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    q = clip(weight, formats.parse(name), steps=200, floor=0.05)
    assert float((weight - q.dequantize()).square().mean()) == pytest.approx(known, rel=0.03)


def test_importance_decides_what_is_clipped() -> None:
    """One large weight on an input that is hardly used: it is clipped; on one that matters, it is not."""
    weight = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([8.0])]).unsqueeze(0)
    format = formats.parse("int3/g32/asym")
    quiet = Facts.of(torch.cat([torch.ones(31), torch.tensor([1e-3])]).unsqueeze(0))
    loud = Facts.of(torch.cat([torch.ones(31), torch.tensor([1e3])]).unsqueeze(0))
    assert float(clip(weight, format, quiet).dequantize()[0, 31]) < 4
    assert float(clip(weight, format, loud).dequantize()[0, 31]) > 7


@pytest.mark.parametrize("name", FORMATS)
def test_unseen_inputs_and_unseen_layers(name: str) -> None:
    weight, _ = case(3, 24, seed=1)
    format = formats.parse(name)
    silent = Facts.of(torch.zeros(4, 24))
    assert torch.equal(clip(weight, format, silent).packed, rtn(weight, format).packed)
    for facts in (None, Facts.none(24)):
        q = clip(weight, format, facts)
        lost = objective.row_errors(weight - q.dequantize(), None)
        assert (lost <= objective.row_errors(weight - rtn(weight, format).dequantize(), None) * (1 + 1e-5)).all()


def test_rows_are_independent_of_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, facts = case(9, 24, seed=2)
    format = formats.parse("int3/g4x2/sym/s6")
    whole = clip(weight, format, facts)
    monkeypatch.setattr(ranges, "CHUNK", 50)
    parts = clip(weight, format, facts)
    assert torch.equal(whole.packed, parts.packed)
    assert all(torch.equal(values, parts.params[key]) for key, values in whole.params.items())


def test_refuses_grids_that_are_none() -> None:
    weight, facts = case(2, 8, seed=0)
    for options in ({"steps": 1}, {"floor": 0.0}, {"floor": 1.0}):
        with pytest.raises(SpecError, match="clipping search"):
            clip(weight, formats.parse("int4/g8/sym"), facts, **options)
