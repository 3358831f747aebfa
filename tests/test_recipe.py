# SPDX-License-Identifier: Apache-2.0
"""Recipes and their transforms: what is refused when built, what calibration they ask for, TOML out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import InputError, SpecError
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


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (3, "recipe rule 3; not a table; one with match and format"),
        ({"match": "*"}, "no format; recipe rules have match and format, and may have activation, method, options"),
        ({"match": "*", "format": "int4/g32", "methd": "gptq"}, "unknown key methd; .* may have activation, method"),
        ({"match": ["*"], "format": "int4/g32"}, r"match = \['\*'\]; not a text; e.g. match = \"\*\""),
        ({"match": "*", "format": 4}, 'format = 4; not a text; e.g. format = "int4/g64"'),
        ({"match": "*", "format": "int4/g32", "activation": 8}, "activation = 8; not a text"),
        ({"match": "*", "format": "int4/g32", "method": ["gptq"]}, r"method = \['gptq'\]; not a text"),
        ({"match": "*", "format": "int4/g32", "options": 3}, "options = 3; not a table; .* { desc_act = true }"),
        ({"match": "*", "format": "int4/g32", "tune": "scales"}, r'not a list; e.g. tune = \["scales"\]'),
        ({"match": "*", "format": "int4/g32", "method": "gptqq"}, "no such method; gptq\\? methods are rtn, clip"),
        ({"match": "*", "format": "int4/g32", "tune": ["scale"]}, "no such tuning; scales\\? tunings are rounding"),
        ({"match": "*", "format": "int4/g32", "transforms": ["quarott"]}, "quarot\\? transforms are smooth"),
        (
            {"match": "*", "format": "int4/g32", "method": "gptq", "options": {"desc": True}},
            "no such option; desc_act\\? its options are damp_percent",
        ),
        (
            {"match": "*", "format": "int4/g32", "method": "gptq", "options": {"block_size": 0}},
            "a whole number from 1 to 1,048,576, e.g. 128",
        ),
    ],
)
def test_an_entry_that_is_no_rule_is_refused_with_what_would_be_one(entry: Any, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        Recipe.from_dict({"rule": [entry]})


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InputError, match="it has no layer of a kind that has a format"):
        Recipe.simple("int4/g32").check([])


@pytest.mark.parametrize(
    ("match", "works"),
    [
        ("foo*", "layers are named like model.embed, model.0.up, model.0.down$"),
        ("kind:linaer", "kinds here are embedding, linear$"),
        ("class:Conv2d", "classes here are Embedding, Linear$"),
    ],
)
def test_a_rule_that_matches_nothing_is_told_what_there_is(match: str, works: str) -> None:
    names = {"model.embed": "Embedding", "model.0.up": "Linear", "model.0.down": "Linear", "model.1.up": "Linear"}
    layers = [(name, "embedding" if kind == "Embedding" else "linear", kind) for name, kind in names.items()]
    with pytest.raises(SpecError, match=works):
        Recipe((Rule(match, "int4/g32"),)).check(layers)


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
