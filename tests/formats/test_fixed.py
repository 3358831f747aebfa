# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import formats
from fewbit.core.observers import NAMES, Seen
from fewbit.errors import SpecError, UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.kernels.reference import round_activations


def fixed(text: str) -> Fixed:
    found = formats.parse(text)
    assert isinstance(found, Fixed)
    return found


@pytest.mark.parametrize("observer", NAMES)
def test_spellings(observer: str) -> None:
    for kind in ("sym", "asym"):
        name = f"int8/static/{kind}/{observer}"
        assert fixed(name).name == name and not fixed(name).bound
    assert fixed("INT8/STATIC").name == "int8/static/asym/mse"
    assert fixed("int4/static/sym").name == "int4/static/sym/mse"
    assert formats.scheme("W8A8_static").activation == "int8/static/asym/mse"


@pytest.mark.parametrize(
    "text",
    [
        "int8/static/median", "int1/static", "int8/static/sym/s0", "int8/static/asym/s0.1", "int8/static/sym/s9e99",
        "int8/static/asym/s0.1/z256", "int8/static/asym/s0.1/z-1", "int4/static/asym/s0.1/z16", "int8/g64/static",
    ],
)  # fmt: skip
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        formats.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.booleans(), st.integers(2, 8))
def test_a_bound_grid_is_spelt_to_the_bit(low: float, high: float, symmetric: bool, bits: int) -> None:
    grid = Fixed(bits, symmetric).at(min(low, high), max(low, high))
    assert formats.parse(grid.name) == grid
    ends = torch.tensor([[min(low, high), 0.0, max(low, high)]])
    rounded = round_activations(ends, grid)
    assert float((rounded - ends).abs().max()) <= grid.scale * 0.5 * (1 + 1e-4) + 2.0**-25
    assert float(rounded[0, 1]) == 0.0


def test_rounding_is_to_the_nearest_value_of_the_grid() -> None:
    grid = fixed("int4/static/asym/s0.5/z5")
    values = 0.5 * (torch.arange(16.0) - 5)
    x = torch.linspace(-6, 8, 1001)
    nearest = values[(x[:, None] - values).abs().argmin(1)]
    ties = ((x[:, None] - values).abs().sort(1).values[:, :2].diff().abs() < 1e-6).squeeze(1)
    assert torch.equal(round_activations(x[None], grid)[0][~ties], nearest[~ties])


def test_calibration_binds_what_the_spelling_asks_for() -> None:
    x = torch.cat([torch.randn(50000, generator=torch.Generator().manual_seed(0)).relu(), torch.tensor([50.0])])
    wide, narrow = (fixed(f"int8/static/asym/{name}").observed(Seen.of(x)) for name in ("minmax", "percentile"))
    assert wide.scale == pytest.approx(50 / 255, rel=1e-6) and wide.zero == 0
    assert narrow.scale < wide.scale / 5
    half = fixed("int8/static/asym/percentile").observed(Seen.of(x), percent=90.0)
    assert half.scale < narrow.scale


def test_before_calibration_nothing_is_rounded() -> None:
    with pytest.raises(UnsupportedError, match="calibrate first"):
        round_activations(torch.ones(1, 4), fixed("int8/static"))
