# SPDX-License-Identifier: Apache-2.0
"""Methods: which codes to choose. One literal table."""

from __future__ import annotations

from fewbit.core.method import Method
from fewbit.errors import SpecError
from fewbit.methods.rtn import rtn

METHODS: tuple[Method, ...] = (
    Method("rtn", rtn, needs="nothing"),
)


def named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise SpecError(f"method {name!r}", "no such method", f"methods are {', '.join(m.name for m in METHODS)}")
