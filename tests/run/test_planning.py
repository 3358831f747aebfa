# SPDX-License-Identifier: Apache-2.0
"""What a plan warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

import fewbit
from fewbit.decode.weights import rounding
from fewbit.formats import parse
from fewbit.recipe import Recipe, Rule


@pytest.mark.parametrize("activation", ["int8/channel", "int8/g32/asym", "int4/channel", "nf4/g32", "mxfp4"])
def test_inputs_that_the_native_runtime_does_not_round_are_told(tiny: Path, activation: str) -> None:
    planned = fewbit.plan(tiny, Recipe((Rule("*", "int8/channel", activation=activation),)))
    told = [warning for warning in planned.warnings if f"rounded to {activation}" in warning]
    assert bool(told) == (rounding(parse(activation)) is None)
