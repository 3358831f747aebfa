# SPDX-License-Identifier: Apache-2.0
"""Scales that float16 cannot hold are told of, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewbit.network
from fewbit import formats, methods
from fewbit.core.facts import Facts
from fewbit.core.reach import told_of

ROWS, COLUMNS, LEAST, LARGEST = 12, 256, 2.0**-24, 65504.0
STEPS = {"int4/g64/sym": 2 / 15, "int4/g64/asym": 1 / 15, "int8/channel/sym": 2 / 255, "nf4/g64": 1, "nf4/g64/dq": 1}
"""Format, and its step as a share of the magnitude, or of the extent, of a group."""


def weight(powers: list[float]) -> torch.Tensor:
    """Rows of numbers of magnitude 10^power, and one of zeros."""
    torch.manual_seed(0)
    drawn = torch.randn(ROWS, COLUMNS)
    drawn[: len(powers)] *= 10.0 ** torch.tensor(powers)[:, None]
    drawn[-1] = 0
    return drawn


@pytest.mark.parametrize("spelling", sorted(STEPS))
def test_what_is_told_is_what_the_definition_of_the_scale_says(spelling: str) -> None:
    """In float64: the scale that a group asks for is above the largest float16, or nearer to zero than to the least."""
    format, drawn = formats.parse(spelling), weight([-9.0, -8.6, -4.0, 5.0, 8.0])
    blocks = drawn.double().numpy().reshape(ROWS, -1, format.block or COLUMNS)
    both = spelling.endswith("asym")
    extent = np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0) if both else np.abs(blocks).max(-1)
    wanted = STEPS[spelling] * extent
    told = told_of(methods.rtn(drawn, format, Facts.none(COLUMNS)), drawn)
    beyond, below = int((wanted > LARGEST).sum()), int(((wanted < LEAST / 2) & (wanted > 0)).sum())
    assert beyond and below
    assert f"{beyond} of {wanted.size} groups reach beyond float16's 65504" in told
    assert f"{below} of {wanted.size} groups need scales below float16's least" in told


@pytest.mark.parametrize("spelling", formats.EXAMPLES)
def test_weights_of_usual_size_are_told_nothing_of(spelling: str) -> None:
    format, drawn = formats.parse(spelling), weight([-3.0, 2.0])
    assert told_of(methods.rtn(drawn, format, Facts.none(COLUMNS)), drawn) == ""


@pytest.mark.parametrize("spelling", formats.EXAMPLES)
def test_huge_weights_are_told_of_or_held(spelling: str) -> None:
    """Whatever the format: either a matrix of 1e9 comes back within a quarter, or it is told."""
    format, drawn = formats.parse(spelling), 1e9 * (1 + torch.rand(16, COLUMNS))
    made = methods.rtn(drawn, format, Facts.none(COLUMNS))
    held = bool(((made.dequantize() - drawn).abs() <= drawn.abs() / 4).all())
    assert held or "reach beyond" in told_of(made, drawn) or format.bits <= 2


def test_the_record_of_a_layer_tells_it() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 8))
    network[0].weight.data *= 1e9
    made = fewbit.network.quantize(network, "int4/channel")
    told = "8 of 8 groups reach beyond float16's 65504: they are cut off"
    assert [record["note"] for record in made.layers] == [told, ""]
