# SPDX-License-Identifier: Apache-2.0
"""Recipes and their transforms: what is refused when built, what calibration they ask for, TOML out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import SpecError
from fewbit.recipe import Recipe, Rule, Step


def rule(*transforms: str | dict[str, Any], method: str = "rtn") -> Rule:
    return Rule("*", "int4/g32", method, transforms=tuple(map(Step.of, transforms)))


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        (["magic"], "transform 'magic'; no such transform; transforms are smooth, rotate"),
        ([{"name": "smooth", "beta": 1}], "option 'beta'.*its options are alpha"),
        ([{"name": "rotate", "alpha": 1}], "it has no options"),
        ([{"name": "smooth", "alpha": 1.5}], "alpha = 1.5.*a number from 0 to 1"),
        ([{"name": "smooth", "alpha": float("nan")}], "out of range"),
        ([{"name": "smooth", "alpha": "much"}], "no number"),
        ([{"name": "smooth", "alpha": True}], "no number"),
        ([{"alpha": 0.5}], "not a name"),
        ([3], "not a name"),
        (["rotate", "smooth"], "smooth after rotate.*put smooth first"),
    ],
)
def test_what_cannot_be_is_refused_when_built(steps: list[Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Recipe.from_dict({"rule": [{"match": "*", "format": "int4/g32", "transforms": steps}]})
    with pytest.raises(SpecError, match=match):
        Recipe.simple("int4/g32", transforms=steps)


def test_transforms_are_a_list_and_not_for_float() -> None:
    with pytest.raises(SpecError, match="not a list"):
        Recipe.from_dict({"rule": [{"match": "*", "format": "int4/g32", "transforms": "smooth"}]})
    with pytest.raises(SpecError, match="stays as it is"):
        Recipe.from_dict({"rule": [{"match": "*", "format": "float", "transforms": ["smooth"]}]})


@pytest.mark.parametrize("format", ["float", "int4/g32"])
def test_a_broken_pattern_is_refused_whatever_the_format(format: str) -> None:
    with pytest.raises(SpecError, match="not a regular expression"):
        Rule("re:(", format)


def test_what_calibration_has_to_collect() -> None:
    assert rule().needs == rule("rotate").needs == "nothing"
    assert rule("smooth").needs == rule("smooth", "rotate").needs == "largest"
    assert rule(method="clip").needs == rule("smooth", method="clip").needs == "mean_square"
    assert rule("rotate", method="clip").needs == rule(method="gptq").needs == "gram"
    assert Rule("*", "float", "gptq").needs == "nothing"
    assert rule(method="skm").needs == rule("smooth", method="skm").needs == "fisher"
    with pytest.raises(SpecError, match="method skm after transform rotate"):
        rule("rotate", method="skm")


def test_toml_out_and_in(tmp_path: Path) -> None:
    recipe = Recipe(
        (
            Rule("kind:head", "float"),
            rule("smooth", "rotate"),
            Rule("a", "int4/g32", "gptq", {"steps": 3}, "int8/channel/sym", (Step("smooth", {"alpha": 0.75}),)),
        )
    )
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.read(path) == recipe == Recipe.from_dict(recipe.to_dict())
    assert 'transforms = ["smooth", "rotate"]' in path.read_text()
    assert 'transforms = [{ name = "smooth", alpha = 0.75 }]' in path.read_text()


def test_simple_gives_the_transforms_to_every_layer_but_embedding_and_head() -> None:
    recipe = Recipe.simple("W8A8", transforms=["smooth"])
    assert [len(rule.transforms) for rule in recipe.rules] == [0, 0, 1]
    assert recipe.rules[-1].activation == "int8/channel/sym"
