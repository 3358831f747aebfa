# SPDX-License-Identifier: Apache-2.0
"""Layouts: where the bits lie. One literal table."""

from __future__ import annotations

from fewbit.core.layout import UNPACKED, Layout
from fewbit.errors import SpecError
from fewbit.layouts.dense import DENSE

LAYOUTS: tuple[Layout, ...] = (UNPACKED, DENSE)


def named(name: str) -> Layout:
    """The layout called ``name``.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise SpecError(f"layout {name!r}", "no such layout", f"layouts are {', '.join(x.name for x in LAYOUTS)}")
