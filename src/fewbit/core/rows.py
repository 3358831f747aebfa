# SPDX-License-Identifier: Apache-2.0
"""Rows of tables by their names, and the options that a row takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, TypeVar

from fewbit.errors import SpecError


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def find(rows: Sequence[Row], name: str, what: str, whole: Sequence[Named] = (), key: str = "") -> Row:
    """The row called ``name``; ``what`` such rows are, in the singular.

    ``whole``: rows of the same kind that are of the whole model, which a recipe names by ``key``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    for row in rows:
        if row.name == name:
            return row
    found = f"it is of the whole model: {key} in a recipe" if name in _names(whole) else f"no such {what}"
    works = f"{meant(name, [*_names(rows), *_names(whole)])}{what}s are {', '.join(_names(rows))}"
    more = f"; of the whole model {', '.join(_names(whole))}" if whole else ""
    raise SpecError(f"{what} {name!r}", found, works + more)


def _names(rows: Sequence[Named]) -> list[str]:
    return [row.name for row in rows]


def meant(name: Any, known: Sequence[str]) -> str:
    """A question, for an error: the one of ``known`` that is spelt nearly as ``name`` is; "" where none is."""
    near = get_close_matches(str(name), known, 1)
    return f"{near[0]}? " if near and near[0] != name else ""


def inline(value: Any) -> str:
    """``value`` as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def check_entry(what: str, entry: Any, must: Mapping[str, Any], may: Mapping[str, Any]) -> None:
    """Refuse what is no table of the keys that it ``must`` and ``may`` have, both with an example of each.

    Raises:
        SpecError: it is none, a key is missing or unknown, or its value is of another kind than the example.
    """
    if not isinstance(entry, dict):
        raise SpecError(f"{what} {entry!r}", "not a table", f"one with {' and '.join(must)}")
    known = {**must, **may}
    found = [f"no {key}" for key in must if key not in entry] + [
        f"unknown key {key}" for key in entry if key not in known
    ]
    if found:
        works = f"{what}s have {' and '.join(must)}, and may have {', '.join(may)}"
        raise SpecError(f"{what} {entry!r}", ", ".join(found), works)
    for key, value in entry.items():
        if not isinstance(value, type(known[key])):
            kinds: dict[type, str] = {str: "a text", list: "a list", dict: "a table"}
            kind = kinds[type(known[key])]
            raise SpecError(f"{what} with {key} = {value!r}", f"not {kind}", f"e.g. {key} = {inline(known[key])}")


class Optioned:
    """Abstract: a row that takes options.

    * ``kind``: what such rows are, in the singular.
    * ``options``: names and defaults: booleans, texts, whole numbers or numbers. ``limits``: least and greatest value
      of each number.
    """

    kind: ClassVar[str]
    name: str
    options: Mapping[str, Any]
    limits: Mapping[str, tuple[float, float]]

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that do not exist, are of another kind than the default, or out of range.

        Raises:
            SpecError: with what would work.
        """
        known, what = self.options, f"{self.kind} {self.name}"
        for name, value in options.items():
            if name not in known:
                works = (
                    f"{meant(name, list(known))}its options are {', '.join(known)}" if known else "it has no options"
                )
                raise SpecError(f"option {name!r} of {what}", "no such option", works)
            found, works = _unfit(value, known[name], self.limits.get(name, (0, 1)))
            if found:
                raise SpecError(f"option {name} = {value!r} of {what}", found, works)

    def filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options``, and the defaults of those that are not among them."""
        return {**self.options, **options}


def _unfit(value: Any, default: Any, limits: tuple[float, float]) -> tuple[str, str]:
    """Why ``value`` cannot stand for ``default``, "" where it can; and what would."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "neither true nor false", f"e.g. {str(default).lower()}"
    truth = isinstance(value, bool)
    if isinstance(default, str):  # which the row itself reads; one number is written without quotation marks
        return "" if isinstance(value, str | int) and not truth else "it is no text", f"e.g. {default}"
    (low, high), whole = limits, isinstance(default, int)
    kind = "whole number" if whole else "number"
    ends = f"{low:g} to {high:,.0f}" if whole else f"{low:g} to {high:g}"
    works = f"a {kind} from {ends}, e.g. {default:g}"
    if truth or not isinstance(value, int if whole else int | float):
        return f"it is no {kind}", works
    return "" if low <= value <= high else "out of range", works
