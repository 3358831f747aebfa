# SPDX-License-Identifier: Apache-2.0
"""What callers hand to public functions, checked for its kind where it comes in: an argument of the wrong kind is
told there, by its name, not in the middle of the work by what it lacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fewbit.errors import SpecError


def kind(what: str, value: Any, kinds: type | tuple[type, ...], works: str) -> None:
    """Refuse a ``value`` that is none of ``kinds``; ``what`` it is the argument for, what ``works``.

    >>> kind("format", 4, str, "for example 'int4/g64'")
    Traceback (most recent call last):
    fewbit.errors.SpecError: format; it is of type int: 4; for example 'int4/g64'

    Raises:
        SpecError: it is of another type.
    """
    if not isinstance(value, kinds):
        shown = " ".join(repr(value).split())
        shown = f": {shown}" if len(shown) <= 60 else ""
        raise SpecError(what, f"it is of type {type(value).__name__}{shown}", works)


def optional(what: str, value: Any, kinds: type | tuple[type, ...], works: str) -> None:
    """:func:`kind`, where there is one."""
    if value is not None:
        kind(what, value, kinds, f"{works}, or None")


def whole(least: int, **numbers: Any) -> None:
    """Refuse numbers, by their names, that are no whole numbers from ``least`` on.

    Raises:
        SpecError: one of them is none.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"{name}={value!r}"[:200], "", f"a whole number from {least} on would work")


def number(value: Any) -> bool:
    """Whether ``value`` is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def model(what: str, value: Any) -> None:
    """Refuse what is no model of transformers in memory, by the configuration that each has. Raises SpecError."""
    if getattr(value, "config", None) is None or not callable(getattr(value, "save_pretrained", None)):
        kind(what, value, (), "a folder, a .gguf file, a hub id, or a loaded model of transformers")


def place(what: str, value: Any) -> Path:
    """``value``, a text or a path, as a path, ``~`` being the user's home. Raises SpecError: it is neither, or there
    is no such user."""
    kind(what, value, (str, os.PathLike), "a path, as text or pathlib.Path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise SpecError(f"{what} {value}", str(error), "./ before a name that begins with ~") from error
