# SPDX-License-Identifier: Apache-2.0
"""Codes of values and values of codes: the compiled way gives what torch gives, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewbit.core import compiled, lookup
from fewbit.kernels import native

ISAS = [isa for isa in ("serial", "avx2") if isa in native.isas()] if native.available() else []


def drawn(count: int, bounds: Tensor) -> Tensor:
    """Unaligned; among them the bounds, what is next to them, and what is no number."""
    around = [torch.nextafter(bounds, torch.full_like(bounds, end)) for end in (-math.inf, math.inf)]
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    values = torch.cat([odd, bounds, *around, torch.randn(count, generator=torch.Generator().manual_seed(count))])
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(1))][1:]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("levels", [2, 3, 16, 255, 256])
@pytest.mark.parametrize("count", [0, 1, 31, 33, 1000])
def test_codes_are_those_of_a_search_in_torch(
    count: int, levels: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = torch.randn(levels - 1, generator=torch.Generator().manual_seed(levels)).sort().values
    many = drawn(2 * count, bounds)
    for values in (many, many[:count], many[: 2 * count : 2]):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "BEST", native.FLAGS[isa])
            found = lookup.codes(values, bounds)
            patch.setattr(compiled, "grids", lambda: None)
            expected = lookup.codes(values, bounds)
        assert found.dtype == expected.dtype == torch.uint8
        assert torch.equal(found, expected)


def test_values_are_the_entries_of_a_table() -> None:
    table, codes = torch.randn(256), torch.randint(0, 256, (3, 0, 5, 7), dtype=torch.uint8)
    assert lookup.values(codes, table).shape == codes.shape
    codes = torch.arange(256, dtype=torch.uint8).flip(0).reshape(4, 64).T
    assert torch.equal(lookup.values(codes, table), table[codes.long()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_values_of_other_types_are_looked_up_too(dtype: torch.dtype) -> None:
    values, bounds = torch.tensor([-2.0, -0.5, 0.25, 3.0], dtype=dtype), torch.tensor([-1.0, 0.0, 1.0])
    assert lookup.codes(values, bounds).tolist() == [0, 1, 2, 3]
