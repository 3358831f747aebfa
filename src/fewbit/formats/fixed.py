# SPDX-License-Identifier: Apache-2.0
"""Activations on one grid for all tokens, ``x = scale * (code - zero)``, fixed before the model runs.

Known as static quantization. A recipe names how the range is to be found: ``int8/static/asym/mse`` is no grid yet, nor
is ``int8/static/asym/percentile99.9``, where the observer is given an option, or ``.../mse2.4/steps50``, where two.
Calibration binds it (see :mod:`fewbit.core.observers`), and what is then spelt, stored and run is
``int8/static/asym/s0.023529412/z131``: the scale a float32, the zero the code of 0. A range that is known beforehand,
such as that of images, may be spelt at once.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from fewbit.core import observers
from fewbit.core.format import Format, Param, Params
from fewbit.core.observers import Seen
from fewbit.errors import SpecError, UnsupportedError

DEFAULT = "mse"
"""The observer of a spelling that names none."""


@dataclass(frozen=True)
class Fixed(Format):
    """``int{bits}/static/{sym|asym}/{observer}``, or bound: ``.../sym/s{scale}``, ``.../asym/s{scale}/z{zero}``.

    ``options``: those of the observer that are not its defaults, (name, value) each, in the order of its table row.
    Of activations only: a weight has no calibration to wait for. A token that holds NaN or infinity becomes NaN.
    """

    bits: int
    symmetric: bool
    observer: str = DEFAULT
    scale: float = 0.0
    zero: int = 0
    options: tuple[tuple[str, float], ...] = ()

    block = 0
    dim = 1

    def __post_init__(self) -> None:
        if self.scale and not 0 <= self.zero < self.levels:
            raise SpecError(f"zero {self.zero} of int{self.bits}/static", "it is no code", f"0 to {self.levels - 1}")
        observers.named(self.observer).check(dict(self.options))

    @property
    def name(self) -> str:
        stem = f"int{self.bits}/static/{'sym' if self.symmetric else 'asym'}"
        if not self.bound:
            own = next(iter(observers.named(self.observer).options), "")  # its number follows the observer's name
            more = ("" if name == own else f"/{name}" for name, _ in self.options)
            numbers = (f"{value!r}".removesuffix(".0") for _, value in self.options)
            return f"{stem}/{self.observer}" + "".join(map("".join, zip(more, numbers, strict=True)))
        return f"{stem}/s{_shortest(self.scale)}" + ("" if self.symmetric else f"/z{self.zero}")

    @property
    def params(self) -> tuple[Param, ...]:
        return (Param("scale", 32, torch.float32),)

    @property
    def bound(self) -> bool:
        """Whether the grid is known."""
        return self.scale != 0

    @property
    def nbytes(self) -> int:
        """Bytes that a layer's grid takes: a scale and, where it is not symmetric, a zero."""
        return 4 if self.symmetric else 5

    def observed(self, seen: Seen) -> Fixed:
        """Bound to what the observer makes of ``seen``."""
        row = observers.named(self.observer)
        low, high = row.range(seen, self.bits, self.symmetric, **row.filled(dict(self.options)))
        return self.at(low, high)

    def at(self, low: float, high: float) -> Fixed:
        """Bound to cover ``[low, high]``."""
        scale, zero = observers.grid(low, high, self.bits, self.symmetric)
        return replace(self, observer=DEFAULT, options=(), scale=scale, zero=zero)

    def check(self) -> None:
        """Raises UnsupportedError where the grid is not known yet."""
        if not self.bound:
            works = "calibrate first, or spell the grid: int8/static/sym/s0.05"
            raise UnsupportedError(f"rounding in {self.name}", "no calibration has fixed its range yet", works)

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """The scale, whatever ``blocks`` hold; NaN for a block that holds NaN or infinity."""
        self.check()
        finite = blocks.isfinite().all(-1, keepdim=True)
        scale = torch.tensor(self.scale, dtype=torch.float32, device=finite.device)
        return {"scale": torch.where(finite, scale, torch.nan)}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        codes = (blocks / params["scale"] + self.zero).round().clamp(0, self.levels - 1)
        return codes.nan_to_num(self.zero).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return params["scale"] * (codes.float() - self.zero)

    def physical(self, params: Mapping[str, Tensor]) -> NoReturn:
        raise UnsupportedError(f"a weight in {self.name}", "it is a format of activations", "int8/channel/sym")


def _shortest(scale: float) -> str:
    """The fewest digits that read back as the float32 ``scale``."""
    for digits in range(1, 9):
        text = f"{scale:.{digits}g}"
        if struct.pack("<f", float(text)) == struct.pack("<f", scale):
            return text
    return f"{scale:.9g}"
