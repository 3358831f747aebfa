# SPDX-License-Identifier: Apache-2.0
"""Options as they are typed: ``NAME=VALUE``, alone or behind the name of a transform or tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewbit.errors import SpecError

_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def settings(given: Sequence[str], known: Mapping[str, Any], asked: str, example: str) -> dict[str, Any]:
    """``["desc_act=no", "damp_percent=0.02"]`` as a dict.

    Values are JSON; where the default in ``known`` is a boolean true, false, yes, no, on or off. What is neither stays
    text, which the check of options refuses.

    Raises:
        SpecError: one holds no ``=``, or a name comes twice; ``asked`` says where, ``example`` what would work.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SpecError(f"{asked} {text}", "it is not NAME=VALUE", f"e.g. {example}")
        if name in found:
            raise SpecError(f"{asked} {text}", f"{name} was given before", "give it once")
        found[name] = _value(value, known.get(name))
    return found


def choice(text: str, rows: Sequence[Any], asked: str, example: str) -> str | dict[str, Any]:
    """``"scales iters=3 lr=0.01"`` as a recipe has it: the name of one of ``rows``, or a dict of it and its options.

    Raises:
        SpecError: what follows the name is no option of that row. A name that no row has is refused by the recipe.
    """
    name, *given = text.split() or [""]
    row = next((row for row in rows if row.name == name), None)
    if row is None or not given:
        return name
    options = settings(given, row.options, f"{asked} {name}:", example)
    row.check(options)
    return {"name": name, **options}


def _value(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        return _SWITCHES.get(text.lower(), text)
    try:
        return json.loads(text)
    except ValueError:
        return text
