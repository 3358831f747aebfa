# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from fewbit import formats
from fewbit.errors import SpecError
from fewbit.formats.schemes import SCHEMES


@pytest.mark.parametrize("name", formats.EXAMPLES)
def test_name_parses_back(name: str) -> None:
    format = formats.parse(name)
    assert format.name == name
    assert formats.parse(name.upper()) == format
    assert formats.parse(f" {name} ") == format


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("int4", "int4/g128/sym"),
        ("int3/g64", "int3/g64/sym"),
        ("int8/channel", "int8/channel/sym"),
        ("int2/asym", "int2/g128/asym"),
        ("int4/min", "int4/g128/min"),
        ("int4/g32x8", "int4/g32x8/sym/s6"),
        ("int4/g32x8/asym", "int4/g32x8/asym/s6"),
        ("nf4", "nf4/g64"),
        ("FP4", "fp4/g64"),
        ("pot4", "pot4/g64"),
        ("mxfp4/g32", "mxfp4"),
        ("nvfp4/g16", "nvfp4"),
        ("sign", "sign/g128"),
        ("ternary", "ternary/g128"),
        ("W4A16", "int4/g128/sym"),
        ("w2a16", "int2/g128/sym"),
        ("W8A16", "int8/g128/sym"),
        ("W4A16_ASYM", "int4/g128/asym"),
        ("NVFP4A16", "nvfp4"),
        ("q4_k", "int4/g32x8/asym/s6"),
        ("Q6_K", "int6/g16x16/sym/s8"),
    ],
)
def test_defaults_and_schemes(short: str, long: str) -> None:
    assert formats.parse(short).name == long


@pytest.mark.parametrize(
    "text",
    [
        "", "int0", "int9", "int4/g0", "int4/g-1", "int4/g128/odd", "int4/g128/sym/sym", "nf4/g0", "nf5",
        "pot1", "pot9", "mxfp4/g16", "nvfp4/g32", "int4/g99999", "int4/g8193", "int4/g4096x8", "int4/g32x8/asym/s9",
        "int4/g32x8/min", "ternary/g128/asym", "W9A16", "W4A4", "int4\n/g128", "int4/channelx8", "ınt4",
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        formats.parse(text)
    assert caught.value.works


@pytest.mark.parametrize(
    ("text", "found", "works"),
    [
        ("palette5", "'palette5' was not understood", "palette{1,2,3,4,6,8}["),
        ("palette4/scale", "'scale' after palette4 was not understood", "[/rows{N} | /row][/lut8]"),
        (
            "int8/static/asym/median",
            "'median' after int8/static/asym was not",
            "/minmax | /average[{share}] | /percentile[{perc",
        ),
        ("int8/static/mse/steps", "'steps' after int8/static/mse was not", "/mse[{power}][/steps{N}][/floor{N}]"),
        ("W8A8_STATIC/foo", "'foo' after W8A8_STATIC was not", "W8A8_STATIC is int8/channel/sym with activations in"),
        ("W4A16/g64", "'g64' after W4A16 was not", "stands alone: W4A16 is int4/g128/sym"),
        ("W9A16", "no such scheme", "W8A16"),
        ("int9", "'int9' was not", "int{1-8}[/g{N}"),
        ("int4/g128/sym/sym", "'sym' after int4/g128/sym was not", "[/sym | /asym | /min]"),
        ("int8/outliers/x", "'x' after int8/outliers was not", "int{2-8}[/g{N} | /channel]/outliers"),
        ("nf5", "'nf5' was not", "nf4 | fp4"),
        ("fp8/g64", "'fp8/g64' was not", "nf4 | fp4"),
        ("mxfp4/g16", "'g16' after mxfp4 was not", "mxfp4[/g32]"),
        ("vector3", "'vector3' was not", "vector{2,4,6,8,12,16}x"),
        ("magic/g64", "'magic/g64' was not", "for example int4/g128/asym"),
        ("", "'' was not", "for example int4/g128/asym"),
    ],
)
def test_what_was_not_understood_and_what_there_is(text: str, found: str, works: str) -> None:
    with pytest.raises(SpecError) as caught:
        formats.parse(text)
    assert found in caught.value.found and works in caught.value.works
    assert text not in ("int9", "int4/g128/sym/sym") or "static" not in str(caught.value)


def test_scheme_with_activations() -> None:
    assert formats.scheme("w8a8") == formats.Scheme("int8/channel/sym", "int8/channel/sym")
    assert formats.scheme("INT8") == formats.scheme("W8A8")
    assert formats.scheme("W4A16").activation is None
    with pytest.raises(SpecError, match="also quantizes activations"):
        formats.parse("W4A8")
    with pytest.raises(SpecError, match="W4A16"):
        formats.scheme("W5A3")


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_names_formats(name: str) -> None:
    found = formats.scheme(name)
    assert formats.parse(found.weight).name == found.weight
    if found.activation is not None:
        assert formats.parse(found.activation).name == found.activation
