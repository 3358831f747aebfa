# SPDX-License-Identifier: Apache-2.0
"""The rotation spreads what stands out, and refuses what it could not mix."""

from __future__ import annotations

import torch

from fewbit.transforms import TRANSFORMS, named, rotate


def test_one_outlier_is_spread_evenly_over_its_block() -> None:
    x = torch.zeros(1, 96)
    x[0, 40] = 100.0
    found = rotate(torch.ones(4, 96), None, seed=3).apply(x)[0]
    assert torch.allclose(found[32:64].abs(), torch.full((32,), 100 / 32**0.5), rtol=1e-6)
    assert bool(found[:32].eq(0).all()) and bool(found[64:].eq(0).all())


def test_odd_widths_are_refused_with_a_reason() -> None:
    refuse = named("rotate").refuse
    assert [refuse(columns) for columns in (2, 6, 4096)] == [None] * 3
    assert "33 columns are odd" in str(refuse(33))
    assert all(row.refuse(64) is None for row in TRANSFORMS)
