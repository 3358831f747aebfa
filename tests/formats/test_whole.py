# SPDX-License-Identifier: Apache-2.0
"""Formats of one scale a tensor: what they store, who takes them, and their range searched as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewbit import formats, layouts, methods
from fewbit.core.facts import Facts
from fewbit.core.terms import matrices
from fewbit.errors import SpecError


def test_spellings() -> None:
    assert formats.parse("INT8/tensor").name == "int8/tensor/sym"
    assert formats.parse("int4/tensor/asym/clip0.9").name == "int4/tensor/asym/clip0.9"
    found = formats.scheme("W8A8_TENSOR")
    assert (found.weight, found.activation) == ("int8/tensor/sym", "int8/tensor/sym")
    for text in ("int8/tensor/g64", "int8/tensor/min", "int9/tensor", "nf4/tensor", "int8/tensor/static"):
        with pytest.raises(SpecError):
            formats.parse(text)


@pytest.mark.parametrize("text", ["int8/tensor/sym", "int4/tensor/asym", "int3/tensor/sym", "int1/tensor/sym"])
def test_one_scale_lies_in_the_file_and_comes_back(text: str) -> None:
    weight = torch.randn(33, 97, generator=torch.Generator().manual_seed(0))
    format = formats.parse(text)
    made = methods.rtn(weight, format).repack(layouts.named("dense"))
    zero = 0 if text.endswith("sym") and "asym" not in text else 1
    assert made.nbytes == 33 * -(-97 * format.bits // 8) + 2 + zero
    assert {tuple(values.shape) for values in made.params.values()} == {(1, 1)}
    if format.bits == 1:
        expected = 2 * weight.double().abs().mean()
    elif zero:
        expected = (weight.max() - weight.min()) / (format.levels - 1)
    else:
        expected = 2 * weight.abs().max() / (format.levels - 1)
    assert float(made.params["scale"]) == float(np.float16(float(expected)))


def test_the_range_is_searched_for_the_whole_matrix_at_once() -> None:
    """Against all ratios one by one, in float64."""
    generator = torch.Generator().manual_seed(5)
    weight, facts = torch.randn(24, 40, generator=generator), Facts.of(torch.randn(90, 40, generator=generator))
    weight[3, 5] = 9.0
    made = methods.named("clip")(weight, formats.parse("int3/tensor/asym"), facts)

    def lost(scale: float, zero: int) -> float:
        codes = np.clip(np.rint(weight.double().numpy() / scale + zero), 0, 7)
        return float((((scale * (codes - zero)) - weight.double().numpy()) ** 2 * facts.mean_square.numpy()).sum())

    tried = []
    for ratio in (1.0, *(1 - 0.6 * i / 23 for i in range(24))):
        low, high = float((weight * ratio).min()), float((weight * ratio).max())
        scale = float(np.float16((high - low) / 7))
        tried.append(lost(scale, round(-low / scale)))
    params = made.logical()[1]
    found = lost(float(params["scale"].reshape(-1)[0]), int(params["zero_point"].reshape(-1)[0]))
    assert found == pytest.approx(min(tried), rel=1e-4) and found < 0.5 * tried[0]


@pytest.mark.parametrize("method", [m.name for m in methods.METHODS if m.refuse(formats.parse("int4/tensor")) is None])
def test_a_large_matrix_has_one_scale_by_every_method(method: str) -> None:
    """More than a search handles at a time."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(300, 2048, generator=generator) * torch.linspace(0.5, 2, 300)[:, None]
    facts = Facts.of(torch.randn(64, 2048, generator=generator), gram=True)
    facts = replace(facts, fisher=torch.rand(300, 2048, generator=generator))
    row = methods.named(method)
    for options in ({"statistic": "percentile"}, {"statistic": "mse"}) if method == "laq" else ({},):
        made = row(weight, formats.parse("int4/tensor"), facts, **options)
        for matrix in matrices(made):
            again = matrix.repack(layouts.named("dense"))
            assert torch.equal(again.dequantize(), matrix.dequantize()) and again.params["scale"].shape == (1, 1)


def test_who_cannot_hold_or_search_it_says_so() -> None:
    format = formats.parse("int8/tensor")
    for name in ("gptq", "awq", "compressed-tensors"):
        reason = layouts.named(name).refuse(format, (64, 64))
        assert reason is not None and "int8/tensor/sym has one for all rows" in reason
    for name in ("awq", "autoround", "imatrix"):
        assert methods.named(name).refuse(format) is not None
    for name in ("rtn", "clip", "laq", "gptq"):
        assert methods.named(name).refuse(format) is None
