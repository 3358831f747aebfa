# SPDX-License-Identifier: Apache-2.0
"""Names that a package offers and imports at their first use: what only runs a model must not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def later(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``: name -> the module that it is taken from, or that it is.

    >>> later("fewbit", {"FewbitError": "fewbit.errors"})("FewbitError").__name__
    'FewbitError'
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(places[name])
        found = module if module.__name__ == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, found)
        return found

    return find
