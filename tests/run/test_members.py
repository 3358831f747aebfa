# SPDX-License-Identifier: Apache-2.0
"""What a layer that is a sum of terms learns with the whole model: the first that one of its matrices has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.run.members import fitting


@pytest.mark.parametrize(
    ("method", "format", "options", "expected"),
    [
        ("billm", "sign/g8", {}, {"distill": "scales", "distill-codes": "scales", "distill-weights": "scales"}),
        (
            "vptq",
            "vector4x3",
            {"outliers": 0.2, "outlier_bits": 3},
            {"distill": "books", "distill-codes": "vectors", "distill-weights": "vectors"},
        ),
    ],
)
def test_the_first_tuning_that_finds_something(
    method: str, format: str, options: dict[str, Any], expected: dict[str, str]
) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    facts = Facts.of(torch.randn(99, 24, generator=torch.Generator().manual_seed(1)), gram=True)
    made = methods.named(method)(weight, formats.parse(format), facts, **options)
    found = {name: fitting(methods.model_tuning(name), made) for name in expected}
    assert {name: one if isinstance(one, str) else one.name for name, one in found.items()} == expected
