# SPDX-License-Identifier: Apache-2.0
"""What torch was told to use by default, or under autocast, changes no bit of what a method makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import formats, methods
from fewbit.core.facts import Accumulator, Facts

Unusual = Callable[[], AbstractContextManager[None]]
FORMATS = {
    "hqq": "int4/g32/min",
    "skm": "palette3/row",
    "squeezellm": "palette3/row",
    "vptq": "vector4x6",
    "billm": "sign/g32",
    "arb": "sign/channel",
    "nanoquant": "sign/channel",
    "ptq161": "int1/channel/min",
}
"""Of methods that do not take integers in groups."""
OPTIONS = {"nanoquant": {"iterations": 2, "rounds": 1, "bits": 2.0}, "laq": {"mean_bits": 4.5}}


def known() -> tuple[Tensor, Facts]:
    random = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, 64, generator=random) for size in (24, 200))
    sums = Accumulator(64, True)
    sums.add(x)
    fisher, square = torch.rand(24, 64, generator=random), torch.rand(24, generator=random)
    return weight, dataclasses.replace(sums.facts(), fisher=fisher, output_square=square)


def tensors(made: Any) -> Iterator[Tensor]:
    """All that ``made``, of dataclasses, holds."""
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, (tuple, list, dict)):
        for part in made.values() if isinstance(made, dict) else made:
            yield from tensors(part)
    elif dataclasses.is_dataclass(made):
        yield from tensors([getattr(made, one.name) for one in dataclasses.fields(made)])


@pytest.mark.parametrize("method", [row.name for row in methods.METHODS])
def test_methods_make_the_same(method: str, unusual: Unusual) -> None:
    format, (weight, facts), options = formats.parse(FORMATS.get(method, "int3/g32/asym")), known(), OPTIONS.get(method)
    solve = getattr(methods, method)  # as users call it
    expected = list(tensors(solve(weight, format, facts, **options or {})))
    with unusual():
        found = list(tensors(solve(weight, format, facts, **options or {})))
    assert expected and len(found) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
