# SPDX-License-Identifier: Apache-2.0
"""AWQ's clip search: the best of its grid by an oracle that runs the tokens, never worse than rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit import formats
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.methods import awq, ranges, rtn
from fewbit.methods.awq import diagonal_blocks
from oracle.awq_oracle import clip_search

FORMATS = (
    "int4/g8/asym",
    "int3/g8/sym",
    "int2/channel/asym",
    "int4/g8/min",
    "int4/g4x4/asym/s6",
    "nf4/g8",
    "ternary/g8",
)


def case(rows: int, columns: int, seed: int, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Inputs (tokens, columns) that depend on one another, and a weight with outliers."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator).pow(3)
    return mixed * torch.randn(columns, generator=generator).exp(), weight


def span_errors(weight: Tensor, values: Tensor, x: Tensor, format: Format) -> Tensor:
    """Mean squared error of each span's part of the output, from the tokens in float64: (rows, spans)."""
    width = format.fit_block or weight.shape[1]
    error = (values - weight).double()
    return torch.stack(
        [
            (x[:, first : first + width].double() @ error[:, first : first + width].T).square().mean(0)
            for first in range(0, weight.shape[1], width)
        ],
        1,
    )


@pytest.mark.parametrize(("name", "group"), [("int4/g8/asym", 8), ("int3/g8/asym", 8), ("int2/channel/asym", 21)])
def test_is_the_best_of_the_grid_group_by_group(name: str, group: int) -> None:
    x, weight = case(6, 21, seed=3)
    format, ratios = formats.parse(name), list(ranges.grid(7, 0.5))
    found = awq(weight, format, Facts.of(x, gram=True), steps=7, floor=0.5)
    lost = span_errors(weight, found.dequantize(), x, format).numpy()
    losses = clip_search(weight.double().numpy(), x.double().numpy(), group, format.levels, ratios)
    np.testing.assert_allclose(lost, losses.min(-1), rtol=1e-4)
    assert (losses.argmin(-1) > 0).mean() > 0.3, "the case is too easy"


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FORMATS), rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_never_worse_than_rounding_in_any_span(name: str, rows: int, columns: int, seed: int) -> None:
    x, weight = case(rows, columns, seed)
    format = formats.parse(name)
    found = awq(weight, format, Facts.of(x, gram=True)).dequantize()
    plain = rtn(weight, format).dequantize()
    lost, least = (span_errors(weight, values, x, format) for values in (found, plain))
    # d G d^T in float32: off by at most some eps of |d| |G| |d|
    magnitude = (x.double().abs() @ (plain - weight).double().abs().T).square().mean(0).unsqueeze(1)
    slack = 8 * (columns + len(x)) * torch.finfo(torch.float32).eps * magnitude
    assert (lost <= least + slack).all()


def test_correlations_count() -> None:
    """Two inputs that are always equal: errors of opposite sign cancel, which E[x^2] alone does not see."""
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).expand(500, 8).contiguous()
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    format = formats.parse("int2/g8/asym")
    found = awq(weight, format, Facts.of(x, gram=True)).dequantize()
    alone = awq(weight, format, Facts.of(torch.eye(8) * 8**0.5, gram=True)).dequantize()
    lost, other = (float(span_errors(weight, values, x, format).sum()) for values in (found, alone))
    assert lost < 0.5 * other


def test_diagonal_blocks() -> None:
    moment = torch.arange(25.0).view(5, 5)
    got = diagonal_blocks(moment, 3)
    assert torch.equal(got[0], moment[:3, :3]) and torch.equal(got[1, :2, :2], moment[3:, 3:])
    assert got.shape == (2, 3, 3) and got[1, 2].eq(0).all() and got[1, :, 2].eq(0).all()
    assert torch.equal(diagonal_blocks(moment, 0)[0], moment)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_independent_of_their_chunk_and_unseen_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = case(9, 24, seed=2)
    format, facts = formats.parse(name), Facts.of(x, gram=True)
    whole = awq(weight, format, facts)
    monkeypatch.setattr(ranges, "CHUNK", 50)
    assert torch.equal(whole.packed, awq(weight, format, facts).packed)
    unseen = awq(weight, format, Facts.none(24)).dequantize()
    lost, plain = ((values - weight).square().sum() for values in (unseen, rtn(weight, format).dequantize()))
    assert lost <= plain * (1 + 1e-5)


def test_what_it_cannot_use_is_refused() -> None:
    x, weight = case(2, 8, seed=0)
    facts = Facts.of(x, gram=True)
    with pytest.raises(InputError, match="second moment"):
        awq(weight, formats.parse("int4/g8/sym"), replace(facts, gram=None))
    with pytest.raises(SpecError, match="clipping search"):
        awq(weight, formats.parse("int4/g8/sym"), facts, steps=1)
    with pytest.raises(UnsupportedError, match="4 weights"):
        awq(weight, formats.parse("vector4x4"), facts)
