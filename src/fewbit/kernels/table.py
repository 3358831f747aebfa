# SPDX-License-Identifier: Apache-2.0
"""The kernel table, best first, and the choice of a row for a format on this machine."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.layout import Shape
from fewbit.errors import FewbitError, SpecError, UnsupportedError
from fewbit.formats.affine import Affine
from fewbit.formats.sign import Sign
from fewbit.kernels import native
from fewbit.kernels.column8 import COLUMN8
from fewbit.kernels.native import Isa
from fewbit.kernels.tile16 import COLUMNS, ROWS, TILE16
from fewbit.kernels.vector16 import VECTOR16

LAYOUTS = {layout.name: layout for layout in (TILE16, COLUMN8, VECTOR16)}
"""Those of native rows."""

LOOKED_UP = 6
"""Bits of a code whose levels "int8_lut" keeps in registers."""


@dataclass(frozen=True)
class Kernel:
    """One row: ``y = x W^T + bias`` for weights of one family, on one instruction set, from one layout.

    The name is ``{family}_linear_{isa}``, as is the file in ``csrc/``. ``family`` "int8" multiplies affine codes by
    activations rounded to int8, in integers, "int8_lut" the levels of a table, and "int8_vector" vectors of a codebook,
    rounded to bytes; "xnor" counts where signs of the weight and of the activations differ; the others multiply float
    activations, "vector" by vectors of a codebook. ``family`` and ``isa`` are None for the reference, which takes
    everything.
    """

    family: Literal["affine", "lut", "vector", "int8", "int8_lut", "int8_vector", "xnor"] | None
    isa: Isa | None
    layout: str

    @property
    def name(self) -> str:
        return f"{self.family}_linear_{self.isa}" if self.isa else "reference"

    @property
    def integers(self) -> bool:
        """Whether activations are rounded to int8 by the kernel itself."""
        return self.family in ("int8", "int8_lut", "int8_vector")

    @property
    def weights(self) -> str | None:
        """The family of weights that it runs: "affine", "lut" or "vector"."""
        if self.family in ("int8", "xnor"):
            return "affine"
        return {"int8_lut": "lut", "int8_vector": "vector"}.get(str(self.family), self.family)

    def refuse(self, format: Format, shape: Shape, activation: Format | None = None) -> str | None:
        """None, or the reason why this row cannot run ``format`` of this ``shape`` (rows, columns) on this machine.

        ``activation``: the format that inputs are rounded to, token by token, or None where they stay float. A row of
        float products takes any: its inputs are rounded beforehand.
        """
        if self.isa is None:
            return None
        if not native.available():
            return native.why_not()
        if self.isa not in native.isas():
            return f"this machine or build has no {self.isa}; it has {', '.join(native.isas())}"
        reason = LAYOUTS[self.layout].refuse(format, shape)
        if reason is not None:
            return f"layout {self.layout} {reason}"
        if self.family == "xnor":
            return _refuse_signs(format, shape, activation)
        found = family(format)
        if found != self.weights:
            return f"runs the {self.weights} family; {format.name} is {found}"
        if any(param.per == "rows" for param in format.params) and format.group_rows % ROWS:
            each = "row" if format.group_rows == 1 else f"{format.group_rows} rows"
            return f"looks up one table in a tile of {ROWS} rows; {format.name} has one for each {each}"
        if self.family == "int8_lut" and format.bits > LOOKED_UP:
            return f"looks up at most {LOOKED_UP} bits a code; {format.name} has {format.bits}"
        return _refuse_integers(format, shape, activation) if self.integers else None


def _refuse_integers(format: Format, shape: Shape, activation: Format | None) -> str | None:
    """Why products of integers cannot serve ``format`` with inputs in ``activation``, or None."""
    if activation is None:
        return "multiplies int8 activations; these stay float"
    if not (isinstance(activation, Affine) and activation.bits == 8 and activation.symmetric and activation.clip == 1):
        return f"rounds activations to int8/g{{N}}/sym; these are {activation.name}"
    for block in (format.block, activation.block):
        if block % COLUMNS and block < shape[1]:
            return f"needs groups of whole chunks of {COLUMNS} columns; there is one of {block}"
    return None


def _refuse_signs(format: Format, shape: Shape, activation: Format | None) -> str | None:
    """Why counting signs cannot serve ``format`` with inputs in ``activation``, or None."""
    if activation is None:
        return "counts signs of activations; these stay float"
    for what, found in (("weights", format), ("activations", activation)):
        if not (isinstance(found, Sign) and B.count(shape[1], found.block) == 1):
            return f"counts signs with one scale a row (sign/channel); {what} are {found.name}"
    return None if shape[1] <= MOST_SIGNS else f"counts at most {MOST_SIGNS} columns; there are {shape[1]}"


MOST_SIGNS = 2**24
"""Columns whose signs add up to an exact float32."""

KERNELS: tuple[Kernel, ...] = (
    Kernel("xnor", "avx512vpopcnt", "tile16"),
    Kernel("xnor", "avx2", "tile16"),
    Kernel("xnor", "neon", "tile16"),
    Kernel("xnor", "serial", "tile16"),
    Kernel("int8", "avx512vnni", "tile16"),
    Kernel("int8", "avxvnni", "tile16"),
    Kernel("int8", "avx2", "tile16"),
    Kernel("int8", "neondot", "tile16"),
    Kernel("int8", "neon", "tile16"),
    Kernel("int8", "serial", "tile16"),
    Kernel("int8_lut", "avx512vnni", "tile16"),
    Kernel("int8_lut", "avxvnni", "tile16"),
    Kernel("int8_lut", "avx2", "tile16"),
    Kernel("int8_lut", "neondot", "tile16"),
    Kernel("int8_lut", "neon", "tile16"),
    Kernel("int8_lut", "serial", "tile16"),
    Kernel("int8_vector", "avx512vbmi", "vector16"),
    Kernel("affine", "avx512", "tile16"),
    Kernel("lut", "avx512", "tile16"),
    Kernel("vector", "avx512", "column8"),
    Kernel("affine", "avx2", "tile16"),
    Kernel("lut", "avx2", "tile16"),
    Kernel("vector", "avx2", "column8"),
    Kernel("affine", "neon", "tile16"),
    Kernel("lut", "neon", "tile16"),
    Kernel("vector", "neon", "column8"),
    Kernel("affine", "serial", "tile16"),
    Kernel("lut", "serial", "tile16"),
    Kernel("vector", "serial", "column8"),
    Kernel("int8_vector", "serial", "vector16"),
    Kernel(None, None, "any"),
)

NAMES = tuple(kernel.name for kernel in KERNELS)


@functools.lru_cache(maxsize=256)
def family(format: Format) -> str:
    """The family that ``format`` lowers to: "affine", "lut" or "vector", or the reason why it lowers to none."""
    weight = torch.linspace(-1, 1, max(format.fit_block, format.block, 32)).reshape(1, -1)
    try:
        bound = format.bind(weight)
        return bound.physical(F.fit(bound, weight)).family
    except FewbitError as error:
        return f"of no family ({error})"


@dataclass(frozen=True)
class Choice:
    """The kernel that will run; ``reasons`` says why each better row will not (name -> reason)."""

    name: str
    isa: Isa | None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def kernel(self) -> Kernel:
        return named(self.name)


def named(kernel: str) -> Kernel:
    """The row of that name.

    Raises:
        SpecError: there is none.
    """
    if kernel not in NAMES:
        raise SpecError(f"kernel {kernel!r}", "there is none of that name", f"these exist: {', '.join(NAMES)}")
    return KERNELS[NAMES.index(kernel)]


def choose(format: Format, shape: Shape, kernel: str | None = None, activation: Format | None = None) -> Choice:
    """The best row for ``format`` of ``shape`` (rows, columns) here, or the one named; no weight is needed.

    ``activation``: the format that inputs are rounded to, or None.

    Raises:
        SpecError: no kernel has that name.
        UnsupportedError: the kernel named cannot run this here, the reason is in the message; or a code of
            ``activation`` would stand for several tokens, or its values would have to be fitted to each.
    """
    if activation is not None and activation.best_fit:
        found = "its values would have to be fitted to every token"
        raise UnsupportedError(f"activations in {activation.name}", found, "int8/g64 works")
    if activation is not None and activation.height > 1:
        raise UnsupportedError(
            f"activations in {activation.name}", f"a code would stand for {activation.height} tokens", "int8/g64 works"
        )
    reasons: dict[str, str] = {}
    for row in KERNELS if kernel is None else (named(kernel),):
        reason = row.refuse(format, shape, activation)
        if reason is None:
            return Choice(row.name, row.isa, reasons)
        reasons[row.name] = reason
    raise UnsupportedError(
        f"kernel {kernel} for {format.name} of shape {tuple(shape)}", reasons[str(kernel)], 'kernel="reference" works'
    )
