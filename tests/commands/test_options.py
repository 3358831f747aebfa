# SPDX-License-Identifier: Apache-2.0
"""Options as they are typed: what they mean, and what is refused before work starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from fewbit import methods, transforms
from fewbit.commands.options import choice, settings
from fewbit.errors import SpecError
from fewbit.recipe import Recipe

Command = Callable[..., Result]


@pytest.mark.parametrize(
    ("text", "value"),
    [*((word, True) for word in ("true", "YES", "On")), *((word, False) for word in ("false", "no", "OFF"))],
)
def test_switches_have_the_usual_spellings(text: str, value: bool) -> None:
    assert settings([f"desc_act={text}"], {"desc_act": True}, "--option", "") == {"desc_act": value}


def test_values_are_numbers_or_text() -> None:
    known = {"a": 1, "b": 0.5, "c": True}
    assert settings(["a=3", "b=-1e-2", "c=1", "d=no"], known, "--option", "") == {
        "a": 3,
        "b": -0.01,
        "c": "1",
        "d": "no",
    }
    with pytest.raises(SpecError, match="given before"):
        settings(["a=3", "a=4"], known, "--option", "")


def test_a_step_carries_its_options() -> None:
    def read(text: str) -> Any:
        return choice(text, (*methods.TUNINGS, *methods.MODEL_TUNINGS), "--tune", '"scales iters=3"')

    assert read("scales iters=3  lr=0.01") == {"name": "scales", "iters": 3, "lr": 0.01}
    assert read("distill iters=3") == {"name": "distill", "iters": 3}
    assert read(" scales ") == "scales" and read("nothing iters=3") == "nothing"
    for text in ("scales name=books", "scales iters=3.5", "scales lr=fast", "scales 3", "scales iters = 3"):
        with pytest.raises(SpecError, match="scales"):
            read(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "gptq", "--option", "desc_act=maybe"), "desc_act = 'maybe' of method gptq; neither true nor false"),
        (("-m", "gptq", "--option", "damp_percent=abc"), "damp_percent = 'abc' of method gptq; it is no number"),
        (("-m", "gptq", "--option", "damp_percent=-1"), "damp_percent = -1 of method gptq; out of range"),
        (("-m", "gptq", "--option", "block_size=0"), "a whole number from 1"),
        (("-m", "clip", "--option", "steps=0"), "a whole number from 2"),
        (("--tune", "scales iters=x"), "iters = 'x' of tuning scales"),
        (("--transform", "smooth alpha=7"), "alpha = 7 of transform smooth; out of range; a number from 0 to 1"),
        (("--transform", "smooth alpha"), '--transform smooth: alpha; it is not NAME=VALUE; e.g. "smooth alpha=0.7"'),
    ],
)
def test_options_are_refused_by_the_plan(
    tiny: Path, command: Command, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    result = command("quantize", tiny, "-f", "int4/g32", *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2 and words in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_of_steps_reach_the_layers(tiny: Path, command: Command) -> None:
    asked = ("--transform", "smooth alpha=0.7", "--tune", "scales iters=3 lr=0.01", "-f", "int4/g32", "--json", "-")
    result = command("plan", tiny, *asked)
    assert result.exit_code == 0, result.stderr
    layer = next(x for x in json.loads(result.stdout)["layers"] if x["name"].endswith("0.mlp.up_proj"))
    assert layer["transforms"] == [{"name": "smooth", "alpha": 0.7}]
    assert layer["tune"] == [{"name": "scales", "iters": 3, "lr": 0.01}]


@pytest.mark.parametrize(
    ("option", "rows"),
    [
        ("--transform", (*transforms.TRANSFORMS, *transforms.MODEL_TRANSFORMS)),
        ("--tune", (*methods.TUNINGS, *methods.MODEL_TUNINGS)),
        ("--method", methods.METHODS),
    ],
)
def test_refusals_and_help_name_every_row(tiny: Path, command: Command, option: str, rows: Any) -> None:
    refused = words(command("plan", tiny, "-f", "int4/g32", option, "rotat").stderr)
    helped = words(command("quantize", "--help").stdout.partition(f"{option} ")[2].partition(" --")[0])
    assert {row.name for row in rows} <= refused & helped


@pytest.mark.parametrize(("option", "need"), [("--gram", "gram"), ("--fisher", "fisher")])
def test_calibrate_names_the_methods_that_need_what_it_collects(command: Command, option: str, need: str) -> None:
    helped = words(command("calibrate", "--help").stdout.partition(f"{option} ")[2].partition(" --r")[0])
    assert {method.name for method in methods.METHODS if method.needs == need} <= helped


def test_doctor_lists_every_row(command: Command) -> None:
    tables = (methods.METHODS, methods.TUNINGS, methods.MODEL_TUNINGS)
    every = {row.name for rows in (*tables, transforms.TRANSFORMS, transforms.MODEL_TRANSFORMS) for row in rows}
    assert every <= words(command("doctor").stdout)


def test_a_rule_is_told_that_a_row_is_of_the_whole_model() -> None:
    for key, name, way in (("transforms", "quarot", "model ="), ("tune", "distill", "end =")):
        with pytest.raises(SpecError, match=f'it is of the whole model: {way} "{name}" in a recipe'):
            Recipe.from_dict({"rule": [{"match": "*", "format": "int4/g32", key: [name]}]})


def words(text: str) -> set[str]:
    """Words, put together again where a table or help wrapped a line at a hyphen."""
    return set(re.findall(r"[\w-]+", re.sub(r"-\n\s*", "-", text)))
