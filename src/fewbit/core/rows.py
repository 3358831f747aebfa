# SPDX-License-Identifier: Apache-2.0
"""Rows of tables by their names, and the options that a row takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

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
    works = f"{what}s are {', '.join(_names(rows))}"
    more = f"; of the whole model {', '.join(_names(whole))}" if whole else ""
    raise SpecError(f"{what} {name!r}", found, works + more)


def _names(rows: Sequence[Named]) -> list[str]:
    return [row.name for row in rows]


def check_options(
    what: str, known: Mapping[str, Any], limits: Mapping[str, tuple[float, float]], given: Mapping[str, Any]
) -> None:
    """Refuse options of ``what`` that do not exist, are of another kind than the default, or out of range.

    Args:
        known: names and defaults: booleans, texts, whole numbers or numbers.
        limits: least and greatest value of each number.

    Raises:
        SpecError: with what would work.
    """
    for name, value in given.items():
        if name not in known:
            works = f"its options are {', '.join(known)}" if known else "it has no options"
            raise SpecError(f"option {name!r} of {what}", "no such option", works)
        found, works = _unfit(value, known[name], limits.get(name, (0, 1)))
        if found:
            raise SpecError(f"option {name} = {value!r} of {what}", found, works)


def _unfit(value: Any, default: Any, limits: tuple[float, float]) -> tuple[str, str]:
    """Why ``value`` cannot stand for ``default``, "" where it can; and what would."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "neither true nor false", f"e.g. {str(default).lower()}"
    truth = isinstance(value, bool)
    if isinstance(default, str):  # which the row itself reads; one number is written without quotation marks
        return "" if isinstance(value, str | int) and not truth else "it is no text", f"e.g. {default}"
    (low, high), whole = limits, isinstance(default, int)
    kind = "whole number" if whole else "number"
    works = f"a {kind} from {low:g} to {high:g}, e.g. {default:g}"
    if truth or not isinstance(value, int if whole else int | float):
        return f"it is no {kind}", works
    return "" if low <= value <= high else "out of range", works
