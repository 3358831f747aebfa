# SPDX-License-Identifier: Apache-2.0
"""The layer-wise objective against its definition over the tokens."""

from __future__ import annotations

import math

import pytest
import torch

from fewbit import formats
from fewbit.core.facts import Facts
from fewbit.methods import objective, rtn


def test_is_the_relative_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(10, 24, generator=generator)
    q = rtn(weight, formats.parse("int3/g8/sym"))
    error = (weight - q.dequantize()).double()
    outputs = math.sqrt(float((x.double() @ error.T).square().sum() / (x.double() @ weight.double().T).square().sum()))
    assert math.isclose(objective.relative_error(weight, q, Facts.of(x, gram=True)), outputs, rel_tol=1e-4)
    assert objective.relative_error(weight, q.dequantize(), Facts.of(x, gram=True)) == objective.relative_error(
        weight, q, Facts.of(x, gram=True)
    )
    rows = objective.row_errors(weight - q.dequantize(), Facts.of(x, gram=True))
    assert torch.allclose(rows, (x.double() @ error.T).square().mean(0), rtol=1e-4)
    square = x.double().square().mean(0)
    diagonal = math.sqrt(float((error.square() @ square).sum() / (weight.double().square() @ square).sum()))
    assert math.isclose(objective.relative_error(weight, q, Facts.of(x)), diagonal, rel_tol=1e-5)
    plain = float(error.norm() / weight.double().norm())
    for facts in (None, Facts.none(24), Facts.none(24, gram=True)):
        assert math.isclose(objective.relative_error(weight, q, facts), plain, rel_tol=1e-5)


@pytest.mark.parametrize("columns", [24, 256, 272, 601])
def test_row_errors_are_those_of_the_outputs(columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(700, columns, generator=generator) + 0.3
    error = torch.randn(5, columns, generator=generator)
    outputs = (x.double() @ error.double().T).square().mean(0)
    assert torch.allclose(objective.row_errors(error, Facts.of(x, gram=True)), outputs, rtol=1e-5)


def test_ends_of_the_scale() -> None:
    weight = torch.ones(2, 3)
    assert objective.relative_error(weight, weight) == 0
    assert objective.relative_error(weight, torch.zeros(2, 3)) == 1
    assert objective.relative_error(torch.zeros(2, 3), torch.zeros(2, 3)) == 0
    assert objective.relative_error(torch.zeros(2, 3), weight) == math.inf
