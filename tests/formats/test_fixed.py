# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import formats
from fewbit.core import observers
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


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int8/static/percentile99.9", "int8/static/asym/percentile99.9"),
        ("int8/static/percentile99.99", "int8/static/asym/percentile"),
        ("int8/static/asym/percentile100", "int8/static/asym/percentile100"),
        ("INT4/static/sym/MSE2.4/Steps50", "int4/static/sym/mse2.4/steps50"),
        ("int4/static/sym/mse/floor0.5/steps50/power3", "int4/static/sym/mse3/steps50/floor0.5"),
        ("int4/static/sym/mse/steps100/floor0.2", "int4/static/sym/mse"),
        ("int8/static/average0.00001", "int8/static/asym/average1e-05"),
        ("int8/static/dobi200", "int8/static/asym/dobi200"),
    ],
)
def test_options_of_observers_are_spelt_one_way(text: str, name: str) -> None:
    assert fixed(text).name == name == fixed(name).name and fixed(text) == fixed(name)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1), st.floats(50, 100), st.floats(0.5, 8), st.integers(2, 10000), st.floats(0.01, 0.99))
def test_options_are_spelt_to_the_bit(share: float, percent: float, power: float, steps: int, floor: float) -> None:
    given = (("average", {"share": share}), ("percentile", {"percent": percent}), ("dobi", {"steps": steps}))
    for observer, options in (*given, ("mse", {"power": power, "steps": steps, "floor": floor})):
        grid = Fixed(8, False, observer, options=tuple(options.items()))
        assert {**observers.named(observer).options, **dict(fixed(grid.name).options)} == options


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("int8/static/percentile0", "percent = 0.0 of observer percentile; out of range; a number from 50 to 100"),
        ("int8/static/percentile1e9", "percent = 1000000000.0 of observer percentile; out of range"),
        ("int8/static/mse/steps5.5", "steps = 5.5 of observer mse; it is no whole number; .* from 2 to 10,000"),
        ("int8/static/mse/steps1", "steps = 1 of observer mse; out of range"),
        ("int8/static/mse/ratios7", "'ratios' of observer mse; no such option; its options are power, steps, floor"),
        ("int8/static/mse2/power3", "power3 of mse; power was given before"),
        ("int8/static/minmax3", "minmax3 .*; minmax has no options; minmax alone"),
        ("int8/static/entropy/steps4", "'steps' of observer entropy; no such option; it has no options"),
    ],
)
def test_options_that_are_wrong_are_refused(text: str, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        formats.parse(text)


def test_every_option_reaches_its_observer() -> None:
    """Against the functions themselves, on a stream of three batches with a tail."""
    generator = torch.Generator().manual_seed(3)
    seen = Seen.none()
    for spread in (1.0, 3.0, 2.0):
        seen = seen.merge(Seen.of((torch.randn(4000, generator=generator).pow(3) + 0.3) * spread))
    for text, range_of in (
        ("average0.5", observers.average(seen, 4, False, share=0.5)),
        ("percentile95", observers.percentile(seen, 4, False, percent=95.0)),
        ("mse4", observers.mse(seen, 4, False, power=4.0)),
        ("mse/steps7", observers.mse(seen, 4, False, steps=7)),
        ("mse/floor0.9", observers.mse(seen, 4, False, floor=0.9)),
        ("dobi3", observers.dobi(seen, 4, False, steps=3)),
    ):
        grid = fixed(f"int4/static/asym/{text}")
        assert grid.observed(seen) == grid.at(*range_of)
        assert grid.observed(seen) != fixed(f"int4/static/asym/{grid.observer}").observed(seen), "it changes the grid"


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
    half = fixed("int8/static/asym/percentile90").observed(Seen.of(x))
    assert half.scale < narrow.scale and fixed(half.name) == half


def test_before_calibration_nothing_is_rounded() -> None:
    with pytest.raises(UnsupportedError, match="calibrate first"):
        round_activations(torch.ones(1, 4), fixed("int8/static"))
