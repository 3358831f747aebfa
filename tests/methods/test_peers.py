# SPDX-License-Identifier: Apache-2.0
"""What other packages make of one layer of a real model, recorded in tests/golden by the scripts there.

Equal codes where the algorithm is deterministic; else an objective that is no worse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats
from fewbit.core.facts import Accumulator, Facts
from fewbit.methods import gptq, rtn, vptq

GOLDEN = Path(__file__).parent.parent / "golden"
FORMATS = {"sym4": "int4/g32/sym", "asym3": "int3/g32/asym"}

pytestmark = pytest.mark.usefixtures("one_thread")


def golden(name: str, case: str = "") -> dict[str, Tensor]:
    """Arrays of ``case``, by what follows it."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as data:
        return {k.removeprefix(case): torch.from_numpy(data[k]) for k in data.files if k.startswith(case)}


def facts_of(inputs: Tensor) -> Facts:
    seen = Accumulator(inputs.shape[1], gram=True)
    seen.add(inputs)
    return seen.facts()


def objective(weight: Tensor, values: Tensor, inputs: Tensor) -> float:
    """tr((W - Q) X'X (W - Q)') in float64."""
    return float((inputs.double() @ (weight.double() - values.double()).T).square().sum())


def grids(found: dict[str, Tensor]) -> Tensor:
    """What codes of groups stand for."""
    blocks = found["codes"].float().reshape(*found["scale"].shape, -1)
    return (found["scale"].unsqueeze(-1) * (blocks - found["zero"].unsqueeze(-1))).reshape(found["codes"].shape)


@pytest.mark.parametrize("order", ["natural", "act"])
@pytest.mark.parametrize("grid", sorted(FORMATS))
@pytest.mark.parametrize("peer", ["gptqmodel", "llmcompressor"])
def test_gptq_has_the_codes_of(peer: str, grid: str, order: str) -> None:
    """Plain ranges, static groups, 1 % damping: the paper's algorithm, which leaves nothing to choose."""
    layer, theirs = golden("layer"), golden(peer, f"{grid}.{order}.")
    weight, inputs = layer[grid].float(), layer["inputs"].float()
    facts, act = facts_of(inputs), order == "act"
    options = {"desc_act": act, "clip": False, "never_worse": False, "damp_percent": 0.01}
    ours = gptq(weight, formats.parse(FORMATS[grid]), facts, **options)
    assert torch.equal(ours.params["scale"].float().squeeze(-1), theirs["scale"])
    if "zero_point" in ours.params:
        assert torch.equal(ours.params["zero_point"].float().squeeze(-1), theirs["zero"])
    assert torch.equal(ours.packed, theirs["codes"])


@pytest.mark.parametrize(
    ("name", "case", "options"),
    [
        ("vector4x6", "", {}),
        ("vector4x6", ".rows", {"norm": "rows"}),
        ("vector4x6", ".columns", {"norm": "columns"}),
        ("vector4x4+4", "", {}),
        ("vector4x4+4", ".outliers", {"outliers": 0.1, "outlier_bits": 3}),
    ],
)
def test_vptq_loses_less_than_gptqmodels(name: str, case: str, options: dict[str, Any]) -> None:
    """As k-means and sweeps leave it; ours goes on from there. Its scales are ranges, with a minimum each."""
    layer, theirs = golden("layer"), golden("gptqmodel_vptq", f"{name}{case}.")["values"]
    weight, inputs = layer["sym4"].float(), layer["inputs"].float()
    facts, format = facts_of(inputs), formats.parse(name)
    found = [vptq(weight, format, facts, rounds=rounds, **options) for rounds in (0, 6)]
    lost = [objective(weight, one.dequantize(), inputs) for one in found]
    assert lost[1] < lost[0] < objective(weight, theirs, inputs)


@pytest.mark.parametrize("bits", [4, 2])
def test_what_quanto_stores(bits: int) -> None:
    weight, theirs = golden("layer")["sym4"].float(), golden("quanto", f"qint{bits}.")
    ours = rtn(weight, formats.parse(f"int{bits}/g32/min"))
    assert torch.equal(ours.params["minimum"].float().squeeze(-1), theirs["minimum"])
    assert torch.equal(ours.params["scale"].float().squeeze(-1), theirs["scale"])
    assert torch.equal(ours.packed, theirs["codes"])


def test_eight_bits_a_row_lose_no_more_than_quantos() -> None:
    """Its grid spans 254 steps, ours 255. Rows of 128 are too short to win: the largest weight, which lies half a step
    beyond the last positive code, then costs as much as finer steps bring."""
    weight, theirs = golden("layer")["sym4"].float().reshape(-1, 512), golden("quanto", "qint8.")["values"]
    ours = rtn(weight, formats.parse("int8/channel/sym")).dequantize()
    assert float((ours - weight).square().sum()) < float((theirs - weight).square().sum())


@pytest.mark.parametrize("name", ["int8/channel/sym", "int4/g32/sym", "int3/g32/asym"])
def test_what_torchao_stores(name: str) -> None:
    """It multiplies by the reciprocal of a scale, and before that is rounded to float16: codes may differ where a
    weight is, by so much, between two."""
    bits, zeros = int(name[3]), "asym" in name
    weight = golden("layer")["asym3" if zeros else "sym4"].float()
    theirs = golden("torchao", f"int{bits}.{'asymmetric' if zeros else 'symmetric'}.")
    ours = rtn(weight, formats.parse(name))
    scale = ours.params["scale"].float()
    assert torch.equal(scale.squeeze(-1), theirs["scale"])
    zero = ours.params["zero_point"].float() if zeros else torch.full_like(scale, 2.0 ** (bits - 1))
    assert torch.equal(zero.squeeze(-1), theirs["zero"])
    steps = (weight.reshape(*scale.shape[:2], -1) / scale).reshape(weight.shape)
    off = 2.0**-11 if "channel" in name else 2.0**-22
    between = (steps - steps.floor() - 0.5).abs() <= off * steps.abs()
    assert torch.equal(ours.packed[~between], theirs["codes"][~between]) and int(between.sum()) < weight.numel() / 20
    assert objective(weight, ours.dequantize(), torch.eye(128)) <= objective(weight, grids(theirs), torch.eye(128))
