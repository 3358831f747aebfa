# SPDX-License-Identifier: Apache-2.0
"""The compiled module, or the reason why it is absent; and what of it solvers and layouts use.

Its kernels are called by :mod:`fewbit.kernels.native`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol, cast

from fewbit.errors import UnsupportedError

ABI = 6
"""``kAbi`` of ``csrc/bind.cc``: both rise when a function's arguments, or what they mean, change."""
BEST = -1
"""For ``isa``: the best that the processor has."""
SWEPT = 128
"""Columns that one call of ``grid_sweep`` takes at most."""


class Grids(Protocol):
    """Of even grids, tables and fields: arguments as in ``csrc/bind_grids.cc``, what they mean in
    ``csrc/include/fewbit_grids.h``."""

    def grid_search(
        self,
        sizes: tuple[int, int, int, int, int, int],
        weight: int,
        worth: int,
        ratios: int,
        scale: int,
        zero: int,
        isa: int,
    ) -> None: ...
    def grid_round(
        self, sizes: tuple[int, int, int, int, int], weight: int, scale: int, zero: int, codes: int, isa: int
    ) -> tuple[float, float]: ...
    def squares(
        self, sizes: tuple[int, int, int], weight: int, codes: int, scale: int, offset: int, table: int, isa: int
    ) -> tuple[float, float]: ...
    def pack_fields(self, codes: int, rows: int, columns: int, bits: int, packed: int) -> None: ...
    def unpack_fields(self, packed: int, rows: int, columns: int, bits: int, codes: int) -> None: ...
    def grid_sweep(
        self,
        sizes: tuple[int, int, int, int],
        current: int,
        before: int,
        upper: tuple[int, int],
        lost: int,
        order: int,
        scale: int,
        zero: int,
        codes: int,
        isa: int,
    ) -> None: ...
    def table_search(
        self,
        sizes: tuple[int, int, int, int, int],
        weight: int,
        worth: int,
        scales: int,
        table: int,
        bounds: int,
        chosen: int,
        isa: int,
    ) -> None: ...
    def table_codes(self, sizes: tuple[int, int, int], values: int, bounds: int, codes: int, isa: int) -> None: ...
    def column_sums(self, sizes: tuple[int, int], x: int, sums: int, isa: int) -> None: ...
    def centers(self, sizes: tuple[int, int, int, int], values: int, weights: int, centers: int) -> None: ...


@functools.cache
def load() -> tuple[Any, str | None]:
    """``fewbit._native`` and None; or None and why it cannot be used.

    Raises:
        UnsupportedError: it was built from other sources than these, and would misread what it is given.
    """
    try:
        module = importlib.import_module("fewbit._native")
    except ImportError as error:
        return None, f"the native module fewbit._native is not usable here ({error})"
    if (built := getattr(module, "ABI", 0)) != ABI:
        raise UnsupportedError(
            f"calling {module.__file__}",
            f"it was built for other sources of fewbit: its ABI is {built}, theirs {ABI}",
            "install fewbit again, which builds it anew",
        )
    return module, None


def grids() -> Grids | None:
    """None without the compiled module."""
    return cast("Grids | None", load()[0])
