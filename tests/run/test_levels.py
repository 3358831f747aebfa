# SPDX-License-Identifier: Apache-2.0
"""Tables and books under integer activations: kernels keep their levels as bytes, which the check of a layer allows
for, as far as they say and no further."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit import formats, kernels, methods
from fewbit.errors import VerificationError
from fewbit.run.solve import check_outputs

pytestmark = pytest.mark.usefixtures("one_thread")
FORMATS = ["palette1", "palette4", "palette6/rows16", "palette2/row", "nf4/g64", "vector4x6", "vector2x4+4"]


@pytest.mark.parametrize("activation", ["int8/channel", "int8/static"])
@pytest.mark.parametrize("format", ["palette4", "nf4/g64", "palette2/row", "vector4x6"])
def test_a_model_is_made_and_loads_as_it_was_checked(
    short: Callable[..., Any], probe_kl: Callable[[Any], float], tmp_path: Path, format: str, activation: str
) -> None:
    made = short(tmp_path / "out", format, "rtn", activation=activation, head="float", force=True)
    assert probe_kl(fewbit.load(made.path)) == pytest.approx(made.manifest["check"]["kl_mean"], rel=0.02)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["int8/channel", "int8/static/asym/s0.03/z120"])
def test_a_kernel_may_round_levels_as_far_as_its_row_says(
    format: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=drawn), torch.randn(8, 64, generator=drawn)
    made, grid = methods.rtn(weight, formats.parse(format)), formats.parse(activation)
    check_outputs(made, made.dequantize(), x, "layer", grid)

    good = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, weight, **more: 1.2 * good(x, weight, **more))
    with pytest.raises(VerificationError, match="times further from the reference than rounding explains"):
        check_outputs(made, made.dequantize(), x, "layer", grid)


def test_a_kernel_at_hand_is_checked_as_one_made_for_it() -> None:
    drawn = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=drawn), torch.randn(8, 64, generator=drawn)
    grid, form = formats.parse("int8/channel"), formats.parse("int8/channel/sym")
    made, other = methods.rtn(weight, form), methods.rtn(1.2 * weight, form)
    check_outputs(made, made.dequantize(), x, "layer", grid, kernels.prepare(made, activation=grid))
    with pytest.raises(VerificationError, match="times further from the reference than rounding explains"):
        check_outputs(made, made.dequantize(), x, "layer", grid, kernels.prepare(other, activation=grid))
