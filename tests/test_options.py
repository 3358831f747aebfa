# SPDX-License-Identifier: Apache-2.0
"""Options of every row of every table: each has limits, and what is out of them never reaches a run."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from fewbit import methods, transforms
from fewbit.core import observers
from fewbit.core.method import Method
from fewbit.errors import SpecError
from fewbit.recipe import Recipe, Rule

ROWS: list[Any] = [
    *methods.METHODS,
    *methods.TUNINGS,
    *methods.MODEL_TUNINGS,
    *transforms.TRANSFORMS,
    *transforms.MODEL_TRANSFORMS,
    *observers.OBSERVERS,
]
OPTIONS = [(row, name) for row in ROWS for name in row.options]


def named(row: Any) -> str:
    return f"{type(row).__name__}-{row.name}" if not isinstance(row, str) else row


@pytest.mark.parametrize(("row", "name"), OPTIONS, ids=named)
def test_every_option_has_limits_and_is_refused_out_of_them(row: Any, name: str) -> None:
    default = row.options[name]
    row.check({name: default})
    if isinstance(default, bool):
        assert name not in row.limits
        row.check({name: not default})
        wrong: tuple[Any, ...] = (0, 1, "no", "true", None)
    elif isinstance(default, str):
        assert name not in row.limits
        wrong = (0.5, True, None)
    else:
        low, high = row.limits[name]
        assert low <= default <= high and low < high
        row.check({name: low})
        row.check({name: high})
        wrong = (low - 1, high + 1, float("nan"), "abc", True, None, *([low + 0.5] if isinstance(default, int) else []))
    for value in wrong:
        with pytest.raises(SpecError, match=rf"option {name} = .* of .*{row.name}; .*; .*e\.g\.") as caught:
            row.check({name: value})
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_limits_are_of_options_that_there_are(row: Any) -> None:
    assert set(row.limits) == {name for name, default in row.options.items() if not isinstance(default, bool | str)}
    with pytest.raises(SpecError, match="no such option"):
        row.check({"colour": 1})


@pytest.mark.parametrize("method", [row for row in methods.METHODS if not row.tuning], ids=named)
def test_defaults_are_those_of_the_function(method: Method) -> None:
    parameters = inspect.signature(method.solve).parameters.values()
    taken = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert method.options == taken


def test_rules_check_the_options_of_their_method() -> None:
    for value, works in (("abc", "a number from 0 to 1"), (-1, "a number from 0 to 1")):
        with pytest.raises(SpecError, match=works):
            Rule("*", "int4/g32", "gptq", {"damp_percent": value})
    entry = {"match": "*", "format": "int4/g32", "method": "gptq", "options": {"desc_act": "no"}}
    with pytest.raises(SpecError, match="neither true nor false"):
        Recipe.from_dict({"rule": [entry]})
