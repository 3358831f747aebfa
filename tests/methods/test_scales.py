# SPDX-License-Identifier: Apache-2.0
"""Learned scales and tables: their gradient entry by entry, and that nothing unstorable is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core import format as F
from fewbit.core.descent import Adam
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.methods.scales import Scales

FORMATS = (
    "int3/g8/asym",
    "int2/g8/sym",
    "int3/g8/min",
    "int4/g4x2/asym/s6",
    "nf4/g8",
    "sign/g8",
    "ternary/channel",
    "palette2",
    "palette2/rows4",
    "palette3/row/g8",
    "vector2x4/g8",
    "vector4x4+4",
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(spelling: str, rows: int = 6, columns: int = 20) -> QTensor:
    return methods.named("rtn")(normal(rows, columns), formats.parse(spelling), Facts.none(columns))


@pytest.mark.parametrize("spelling", FORMATS)
def test_gradient_of_every_stored_number(spelling: str) -> None:
    """Values are linear in each stored number: moving one by its unit changes them by its gradient, exactly."""
    start = rounded(spelling)
    learner, grad = Scales(normal(6, 20), start), normal(6, 20, seed=1)
    assert torch.equal(learner.weight(learner.start), start.dequantize())
    found = learner.gradient(learner.start, grad)
    codes, stored = start.logical()
    for param in start.format.params:
        if param.dtype != torch.float16:
            continue
        # what is stored once, by the bytes that it takes on disk
        once = {"tensor": 1, "rows": -(-stored[param.name].shape[0] // max(1, start.format.group_rows))}
        each = learner.start[param.name]
        assert each.shape[0] == once.get(param.per, 1 if param.per == "columns" else stored[param.name].shape[0])
        plain = stored[param.name].double()
        for index in np.ndindex(*each.shape):
            moved = plain.clone()
            unit = float(learner._unit[param.name][index])
            moved[_places(param.per, start, index)] += unit
            change = F.decode(start.format, codes, {**stored, param.name: moved.float()})[:6] - start.dequantize()
            expected = float((change.double() * grad.double()).sum())
            magnitude = float((change.double() * grad.double()).abs().sum())
            tolerance = 1e-5 * magnitude + 1e-4 * unit
            assert abs(float(found[param.name][index]) - expected) <= tolerance, (param.name, index)


def _places(per: str, start: QTensor, index: tuple[int, ...]) -> tuple[slice | int, ...]:
    """Where the entry ``index`` of what is stored once lies in (rows, blocks, 1, ...)."""
    row, block, rest = index[0], index[1], index[3:]
    group = start.format.group_rows
    span = 2 if per == "span" else 1
    rows: slice | int = {
        "tensor": slice(None),
        "columns": slice(None),
        "rows": slice(row * group, (row + 1) * group),
    }.get(per, row)
    blocks = slice(None) if per in ("tensor", "rows") else slice(block * span, (block + 1) * span)
    return (rows, blocks, slice(None), *rest)


@pytest.mark.parametrize("spelling", FORMATS)
def test_codes_stay_and_come_back(spelling: str) -> None:
    start = rounded(spelling)
    learner = Scales(normal(6, 20), start)
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.rand(array.shape, generator=generator) - 0.5 for name, array in learner.start.items()}
    end = learner.freeze(values)
    assert torch.equal(end.packed, start.packed)
    assert not torch.equal(end.dequantize(), start.dequantize()) or spelling.startswith("palette")
    if "+" in spelling:
        return  # sums of two vectors need not come back from the first
    again = F.encode(end.format, end.dequantize(), end.params)
    assert torch.equal(again, end.packed)


def test_a_table_out_of_order_is_not_kept() -> None:
    """Two levels that change places would each come back as the other's code."""
    start = rounded("palette2/rows4", rows=8)
    learner = Scales(normal(8, 20), start)
    values = {"table": torch.zeros_like(learner.start["table"])}
    gap = learner._from["table"][1, 0, 0, 1] - learner._from["table"][1, 0, 0, 0]
    values["table"][1, 0, 0, 0] = 1.5 * gap / learner._unit["table"][1, 0, 0, 0]
    values["table"][0, 0, 0, 3] = 0.2
    end = learner.freeze(values)
    assert torch.equal(end.params["table"][4:], start.params["table"][4:]), "the second group keeps its table"
    assert not torch.equal(end.params["table"][:4], start.params["table"][:4]), "the first one need not"


def test_what_holds_no_float_is_refused() -> None:
    assert methods.tuning("scales").refuse(formats.parse("mxfp4"))
    assert methods.tuning("scales").refuse(formats.parse("int4/g64/asym")) is None


def test_adam_is_the_paper_s() -> None:
    grads = normal(5, 3, seed=7).double().numpy()
    value, rule = torch.zeros(3), Adam()
    m = v = x = np.zeros(3)
    eps = rule.EPS * np.abs(grads[0]).max()
    for t, g in enumerate(grads, 1):
        m, v = rule.B1 * m + (1 - rule.B1) * g, rule.B2 * v + (1 - rule.B2) * g * g
        x = x - 0.01 * (m / (1 - rule.B1**t)) / (np.sqrt(v / (1 - rule.B2**t)) + eps)
        rule.step("x", value, torch.from_numpy(g).float(), 0.01)
        np.testing.assert_allclose(value.double().numpy(), x, rtol=1e-5, atol=1e-8)
