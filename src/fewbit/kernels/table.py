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
from fewbit.core.layout import Layout, Shape
from fewbit.errors import FewbitError, SpecError, UnsupportedError
from fewbit.formats.affine import Affine
from fewbit.formats.fixed import Fixed
from fewbit.formats.outliers import Outliers
from fewbit.formats.sign import Sign
from fewbit.kernels import native
from fewbit.kernels.arranged import BYTES16, HALVES16, ROWHALVES16
from fewbit.kernels.column8 import COLUMN8
from fewbit.kernels.levels import LONGEST, MOST
from fewbit.kernels.native import Isa
from fewbit.kernels.row16 import ROW16, chunk
from fewbit.kernels.tile16 import COLUMNS, ROWS, TILE16
from fewbit.kernels.vector16 import VECTOR16

LAYOUTS = {layout.name: layout for layout in (TILE16, COLUMN8, ROW16, VECTOR16)}
"""Those of native rows."""

ARRANGED = {
    ("int8_linear_avx2", 1): BYTES16,
    ("int8_linear_avx2", 3): HALVES16,
    ("int8_lut_linear_avx2", 3): HALVES16,
    ("int8_row_lut_linear_avx2", 3): ROWHALVES16,
}
"""What rows rather take codes of so many bits in."""

LOOKED_UP = 6
"""Bits of a code whose levels "int8_lut" keeps in registers."""

PRODUCTS = 4
"""Bits of a code whose products with an activation "int24_lut" looks up."""

Family = Literal[
    "int24",
    "int24_lut",
    "affine",
    "lut",
    "row_lut",
    "vector",
    "int8",
    "int8_lut",
    "int8_row_lut",
    "int8_vector",
    "xnor",
]
WEIGHTS = {"int24": "affine", "int8": "affine", "xnor": "affine", "int8_vector": "vector"} | dict.fromkeys(
    ("int24_lut", "int8_lut", "row_lut", "int8_row_lut"), "lut"
)
"""The family of weights that rows of another family run."""


MEANT: dict[str, tuple[Family, ...]] = {"affine": ("affine",), "lut": ("lut", "row_lut"), "vector": ("vector",)}
"""Rows of float products by the family of weights."""


@dataclass(frozen=True)
class Kernel:
    """One row: ``y = x W^T + bias`` for weights of one family, on one instruction set, from one layout.

    The name is ``{family}_linear_{isa}``, as is the file in ``csrc/``. ``family`` "int24" multiplies affine codes by
    activations in fixed point of 24 bits (:func:`fewbit.kernels.reference.int24`), in integers; "int24_lut" rounds
    products of levels and float activations to integers of 24 bits, which it looks up; "int8" multiplies by activations
    rounded to int8, "int8_lut" the levels of a table, "int8_row_lut" those of tables of rows, and "int8_vector" vectors
    of a codebook, rounded to bytes; "xnor" counts where signs of the weight and of the activations differ. The others
    multiply float activations: "row_lut" by tables of rows, "vector" by vectors of a codebook. ``family`` and ``isa``
    are None for the reference, which takes everything.
    """

    family: Family | None
    isa: Isa | None
    layout: str

    @property
    def name(self) -> str:
        return f"{self.family}_linear_{self.isa}" if self.isa else "reference"

    @property
    def integers(self) -> bool:
        """Whether activations are rounded to int8 by the kernel itself."""
        return self.family in ("int8", "int8_lut", "int8_row_lut", "int8_vector")

    @property
    def weights(self) -> str | None:
        """The family of weights that it runs: "affine", "lut" or "vector"."""
        return WEIGHTS.get(str(self.family), self.family)

    def level_error(self, format: Format) -> float:
        """How far the levels that this row multiplies may be from those of ``format``: a share of the largest, as
        :meth:`fewbit.core.format.Physical.largest` has it; 0 where they are the very ones. See
        :mod:`fewbit.kernels.levels` and :func:`fewbit.kernels.byte_vectors.to_bytes`."""
        if self.family == "int8_vector":
            return 1 / 255 + 2.0**-16
        if self.family in ("int8_lut", "int8_row_lut"):
            return 1 / (2 * MOST) + 2.0**-17 if format.bits <= LONGEST else 2.0**-15
        return 0.0

    def arranged(self, format: Format) -> Layout:
        """The layout that codes of ``format`` lie in: :attr:`layout`, or what is quicker to read at so many bits."""
        return ARRANGED.get((self.name, format.bits), LAYOUTS[self.layout])

    def outdone(self, format: Format) -> str | None:
        """None, or why a later row is the better choice for ``format``, though this one runs it."""
        if self.name == "int24_linear_avx512vnni" and format.bits == 1:
            return "affine_linear_avx512 is faster at 1 bit, as it looks up sums of activations"
        if self.name == "int24_linear_avx2" and format.bits == 8:
            return "affine_linear_avx2 is faster at 8 bits, which this row multiplies as two codes of 4"
        return None

    def refuse(self, format: Format, shape: Shape, activation: Format | None = None) -> str | None:
        """None, or the reason why this row cannot run ``format`` of this ``shape`` (rows, columns) on this machine.

        ``activation``: the format that inputs are rounded to, token by token, or None where they stay float. A row of
        float products takes any: its inputs are rounded beforehand.
        """
        if self.isa is None:
            return None
        if (lacking := native.lacks(self.isa)) is not None:
            return lacking
        reason = LAYOUTS[self.layout].refuse(format, shape)
        if reason is not None:
            return f"layout {self.layout} {reason}"
        if self.family == "xnor":
            return _refuse_signs(format, shape, activation)
        found = family(format)
        if found != self.weights:
            return f"runs the {self.weights} family; {format.name} is {found}"
        tables = any(param.per == "rows" for param in format.params)
        if self.family in ("int8_vector", "int8_row_lut") and one_grid(activation):
            return f"rounds each token by a scale of its own; activations are {activation.name}"  # type: ignore[union-attr]
        if self.family == "row_lut":
            return _refuse_tables(format, shape, tables)
        if self.family == "int8_row_lut":
            return _refuse_tables(format, shape, tables) or _refuse_levels(format, shape, activation)
        if tables and format.group_rows % ROWS:
            each = "row" if format.group_rows == 1 else f"{format.group_rows} rows"
            return f"looks up one table in a tile of {ROWS} rows; {format.name} has one for each {each}"
        if self.family == "int8_lut" and format.bits > LOOKED_UP:
            return f"looks up at most {LOOKED_UP} bits a code; {format.name} has {format.bits}"
        if self.family == "int24_lut" and format.bits > PRODUCTS:
            return f"looks up products of at most {PRODUCTS} bits a code; {format.name} has {format.bits}"
        if self.family in ("int24", "int24_lut"):
            return refuse_blocks(shape, format)
        return _refuse_integers(format, shape, activation) if self.integers else None


def one_grid(activation: Format | None) -> bool:
    """Whether all tokens of a call lie on one grid."""
    return isinstance(activation, Fixed) or (activation is not None and activation.whole)


def _refuse_tables(format: Format, shape: Shape, tables: bool) -> str | None:
    """Why rows of tables cannot hold ``format``, which has ``tables`` of groups of rows, or None."""
    if not tables:
        return f"looks up tables of rows; {format.name} has one for all"
    columns = chunk(format.bits)
    if format.block % columns and format.block < shape[1]:
        return f"needs groups of whole chunks of {columns} columns; there is one of {format.block}"
    return None


def _refuse_levels(format: Format, shape: Shape, activation: Format | None) -> str | None:
    """Why rows of tables of integers cannot serve ``format`` with inputs in ``activation``, or None."""
    if format.bits > MOST_ROW_BITS:
        return f"looks up at most {MOST_ROW_BITS} bits a code; {format.name} has {format.bits}"
    if shape[1] > MOST_ROW_COLUMNS:
        return f"sums up at most {MOST_ROW_COLUMNS} columns; there are {shape[1]}"
    reason = _refuse_integers(format, shape, activation)
    if reason is None and activation is not None and max(B.count(shape[1], f.block) for f in (format, activation)) > 1:
        reason = "takes one scale a row and one a token (int8/channel)"
    return reason


def _refuse_integers(format: Format, shape: Shape, activation: Format | None) -> str | None:
    """Why products of integers cannot serve ``format`` with inputs in ``activation``, or None."""
    if activation is None:
        return "multiplies int8 activations; these stay float"
    own = isinstance(activation, Affine) and activation.symmetric and activation.clip == 1
    if not (own or isinstance(activation, Fixed)) or activation.bits != 8:
        return f"rounds activations to int8/g{{N}}/sym or int8/static; these are {activation.name}"
    return refuse_blocks(shape, format, activation)


def refuse_blocks(shape: Shape, *formats: Format) -> str | None:
    """Why groups of these ``formats`` cannot be summed up in integers, or None."""
    for block in (format.block for format in formats):
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


MOST_ROW_BITS = 4
"""Of a code whose levels "int8_row_lut" keeps in registers."""
MOST_ROW_COLUMNS = 2**16
"""Columns whose products of bytes an int32 holds."""
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
    Kernel("int8", "neoni8mm", "tile16"),
    Kernel("int8", "neondot", "tile16"),
    Kernel("int8", "neon", "tile16"),
    Kernel("int8", "serial", "tile16"),
    Kernel("int8_lut", "avx512vnni", "tile16"),
    Kernel("int8_lut", "avxvnni", "tile16"),
    Kernel("int8_lut", "avx2", "tile16"),
    Kernel("int8_lut", "neoni8mm", "tile16"),
    Kernel("int8_lut", "neondot", "tile16"),
    Kernel("int8_lut", "neon", "tile16"),
    Kernel("int8_lut", "serial", "tile16"),
    Kernel("int8_row_lut", "avx512vnni", "row16"),
    Kernel("int8_row_lut", "avxvnni", "row16"),
    Kernel("int8_row_lut", "avx2", "row16"),
    Kernel("int8_row_lut", "neondot", "row16"),
    Kernel("int8_vector", "avx512vbmi", "vector16"),
    Kernel("int8_vector", "avx2", "vector16"),
    Kernel("int24", "avx512vnni", "tile16"),
    Kernel("int24", "avxvnni", "tile16"),
    Kernel("int24", "neoni8mm", "tile16"),
    Kernel("int24", "neondot", "tile16"),
    Kernel("affine", "avx512", "tile16"),
    Kernel("lut", "avx512", "tile16"),
    Kernel("row_lut", "avx512", "row16"),
    Kernel("vector", "avx512", "column8"),
    Kernel("int24", "avx2", "tile16"),
    Kernel("int24_lut", "avx2", "tile16"),
    Kernel("affine", "avx2", "tile16"),
    Kernel("lut", "avx2", "tile16"),
    Kernel("row_lut", "avx2", "row16"),
    Kernel("vector", "avx2", "column8"),
    Kernel("affine", "neon", "tile16"),
    Kernel("lut", "neon", "tile16"),
    Kernel("row_lut", "neon", "row16"),
    Kernel("vector", "neon", "column8"),
    Kernel("affine", "serial", "tile16"),
    Kernel("int24", "serial", "tile16"),
    Kernel("lut", "serial", "tile16"),
    Kernel("int24_lut", "serial", "tile16"),
    Kernel("row_lut", "serial", "row16"),
    Kernel("vector", "serial", "column8"),
    Kernel("int8_row_lut", "serial", "row16"),
    Kernel("int8_vector", "serial", "vector16"),
    Kernel(None, None, "any"),
)

NAMES = tuple(kernel.name for kernel in KERNELS)


@functools.lru_cache(maxsize=256)
def family(format: Format) -> str:
    """The family that ``format`` lowers to: "affine", "lut" or "vector", or the reason why it lowers to none."""
    if format.even:
        return "affine"
    if format.height > 1:
        return "vector"
    weight = torch.linspace(-1, 1, max(format.fit_block, format.block, 32), dtype=torch.float32).reshape(1, -1)
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


def no_row(choice: Choice, format: Format) -> str:
    """Why none of the rows that are made for weights such as ``format``, float inputs and any processor runs it."""
    found = family(format)
    refused = ((name, reason) for name, reason in choice.reasons.items() if named(name).isa == "serial")
    meant = [f"{name} {reason}" for name, reason in refused if named(name).family in MEANT.get(found, ())]
    return "; ".join(meant) or f"{format.name} is {found}"


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
    if activation is not None and (activation.best_fit or activation.plain is not None):
        found = "its values would have to be fitted to every token"
        raise UnsupportedError(f"activations in {activation.name}", found, "int8/g64 works")
    if activation is not None and activation.height > 1:
        raise UnsupportedError(
            f"activations in {activation.name}", f"a code would stand for {activation.height} tokens", "int8/g64 works"
        )
    if isinstance(activation, Outliers):
        activation = activation.inner  # what stays float runs on a row of float products, beside this one
    return _chosen(format, shape, kernel, activation, (native.why_not(), *native.isas()))


@functools.lru_cache(maxsize=1024)
def _chosen(
    format: Format, shape: Shape, kernel: str | None, activation: Format | None, machine: tuple[str | None, ...]
) -> Choice:
    """Networks have many layers of few shapes; ``machine``: what rows ask of it."""
    reasons: dict[str, str] = {}
    for row in KERNELS if kernel is None else (named(kernel),):
        reason = row.refuse(format, shape, activation) or (row.outdone(format) if kernel is None else None)
        if reason is None:
            return Choice(row.name, row.isa, reasons)
        reasons[row.name] = reason
    raise UnsupportedError(
        f"kernel {kernel} for {format.name} of shape {tuple(shape)}", reasons[str(kernel)], 'kernel="reference" works'
    )
