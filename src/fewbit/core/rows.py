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


def find(rows: Sequence[Row], name: str, what: str) -> Row:
    """The row called ``name``; ``what`` such rows are, in the singular.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    for row in rows:
        if row.name == name:
            return row
    raise SpecError(f"{what} {name!r}", f"no such {what}", f"{what}s are {', '.join(row.name for row in rows)}")


def check_options(
    what: str, known: Mapping[str, float], limits: Mapping[str, tuple[float, float]], given: Mapping[str, Any]
) -> None:
    """Refuse options of ``what`` that do not exist or are out of range, or no whole numbers where the default is one.

    Args:
        known: names and defaults.
        limits: least and greatest value of each.

    Raises:
        SpecError: with what would work.
    """
    for name, value in given.items():
        if name not in known:
            works = f"its options are {', '.join(known)}" if known else "it has no options"
            raise SpecError(f"option {name!r} of {what}", "no such option", works)
        low, high = limits[name]
        whole = isinstance(known[name], int)
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not low <= value <= high:
            works = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}, e.g. {known[name]:g}"
            raise SpecError(f"option {name} = {value!r} of {what}", "out of range", works)
