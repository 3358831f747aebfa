# SPDX-License-Identifier: Apache-2.0
"""Terms: a weight as a sum of few kinds of parts, as plain data.

::

    W = diag(row_scale) (T_1 + T_2 + ...) diag(column_scale)

    Dense(qtensor)                one quantized matrix
    Product(left, middle, right)  left diag(middle) right, of low rank
    Sparse(...)                   few entries, kept in 16 or 32 bits; zero elsewhere
    Columns(permutation, parts)   column subsets, each a term of its own
    Terms(...)                    such a sum again

Papers are sentences of it: SqueezeLLM (arXiv:2306.07629) is ``Dense + Sparse``, OneBit (arXiv:2402.11295) a ``Dense``
of signs under both scales, TRQ a sum of signs, PTQ1.61 (arXiv:2502.13179) ``Columns`` of 4 bits and of 1 bit, and
LittleBit (arXiv:2506.13771) a ``Product`` of signs under both scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.layout import Layout
from fewbit.core.qtensor import QTensor
from fewbit.core.sums import all_finite
from fewbit.errors import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of scales."""


class Term(ABC):
    """Abstract. A (rows, columns) matrix."""

    shape: tuple[int, int]

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The float32 (rows, columns) matrix that this stands for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, indices, pointers; everything."""

    @property
    def bits_per_weight(self) -> float:
        """True stored bits per weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass(frozen=True, eq=False)
class Dense(Term):
    """One quantized matrix."""

    qtensor: QTensor

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.qtensor.shape

    def dequantize(self) -> Tensor:
        return self.qtensor.dequantize()

    @property
    def nbytes(self) -> int:
        return self.qtensor.nbytes


@dataclass(frozen=True, eq=False)
class Product(Term):
    """``left diag(middle) right``: (rows, rank), (rank,) or None for ones, (rank, columns).

    Raises:
        InputError: ranks differ, or ``middle`` is not (rank,) finite floats.
    """

    left: QTensor
    middle: Tensor | None
    right: QTensor

    def __post_init__(self) -> None:
        rank = self.left.shape[1]
        if self.right.shape[0] != rank:
            asked = f"a product of {self.left.shape} and {self.right.shape}"
            raise InputError(asked, "their ranks differ", f"a right factor of {rank} rows would work")
        _check_scale("middle of a product", self.middle, rank)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.left.shape[0], self.right.shape[1]

    def dequantize(self) -> Tensor:
        left = self.left.dequantize()
        return (left if self.middle is None else left * self.middle.float()) @ self.right.dequantize()

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes + _bytes(self.middle)


def index_dtype(columns: int) -> torch.dtype:
    """What a column out of ``columns`` is stored as."""
    return torch.uint16 if columns <= 1 << 16 else torch.int32


def foremost(worth: Tensor, count: int) -> Tensor:
    """(columns,): the ``count`` columns of largest ``worth`` (columns,), then the others, both in their own order."""
    order = torch.argsort(worth, descending=True, stable=True)
    return torch.cat([order[:count].sort().values, order[count:].sort().values])


@dataclass(frozen=True, eq=False)
class Sparse(Term):
    """Few entries of a matrix, by rows (CSR): row r has entries ``[pointers[r], pointers[r + 1])``.

    Bits of an entry: 16 (32 where a row has more than 65536 columns) for its column, and 16 or 32 for its value; and 32
    (64 past 2^31 entries) a row.

    Args:
        shape: (rows, columns).
        pointers: (rows + 1,) int32 or int64; from 0, never falling, to the number of entries.
        columns: (entries,) uint16 (where there are at most 65536 columns) or int32; rising within a row.
        values: (entries,) float16 or float32, finite.

    Raises:
        InputError: any of that does not hold.
    """

    shape: tuple[int, int]
    pointers: Tensor
    columns: Tensor
    values: Tensor

    @staticmethod
    def of(matrix: Tensor, dtype: torch.dtype = torch.float16) -> Sparse:
        """The entries of ``matrix`` (rows, columns) that are not zero, rounded to ``dtype``."""
        rows, columns = matrix.nonzero(as_tuple=True)
        return Sparse.at((matrix.shape[0], matrix.shape[1]), rows, columns, matrix[rows, columns], dtype)

    @staticmethod
    def at(
        shape: tuple[int, int], rows: Tensor, columns: Tensor, values: Tensor, dtype: torch.dtype = torch.float16
    ) -> Sparse:
        """``values`` (entries,), rounded to ``dtype``, at ``rows`` and ``columns`` (entries,) in any order.

        Raises:
            InputError: an index is out of range or comes twice, or a value is not finite in ``dtype``.
        """
        rows, columns = rows.long(), columns.long()
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= shape[0]):
            found = f"rows go from {int(rows.min())} to {int(rows.max())}"
            raise InputError(f"sparse entries of a {shape} matrix", found, f"0 to {shape[0] - 1} would work")
        order = torch.argsort(rows * shape[1] + columns, stable=True)
        counts = torch.bincount(rows, minlength=shape[0])
        pointers = torch.cat([torch.zeros(1, dtype=torch.int64, device=rows.device), counts.cumsum(0)])
        # Narrowed only once they are known to fit: a column that wraps around would pass for another.
        _check_columns(shape, rows[order], columns[order])
        narrow = pointers.to(torch.int32 if rows.numel() < 1 << 31 else torch.int64)
        return Sparse(shape, narrow, columns[order].to(index_dtype(shape[1])), values[order].to(dtype))

    def __post_init__(self) -> None:
        asked, (rows, columns) = f"sparse entries of a {self.shape} matrix", self.shape
        indices = tuple(dict.fromkeys((index_dtype(columns), torch.int32)))
        for name, array, dtypes in (
            ("pointers", self.pointers, (torch.int32, torch.int64)),
            ("columns", self.columns, indices),
            ("values", self.values, (torch.float16, torch.float32)),
        ):
            if array.dtype not in dtypes or array.ndim != 1:
                works = f"one axis of {' or '.join(map(str, dtypes))} would work"
                raise InputError(asked, f"{name} are {array.dtype} {tuple(array.shape)}", works)
        entries = self.values.numel()
        if min(self.shape) < 1 or self.columns.numel() != entries or self.pointers.numel() != rows + 1:
            sizes = f"{self.pointers.numel()} pointers, {self.columns.numel()} columns and {entries} values"
            raise InputError(asked, sizes, f"{rows + 1} pointers, and as many columns as values, would work")
        counts = self.pointers.long().diff()
        first, last, least = int(self.pointers[0]), int(self.pointers[-1]), int(counts.min())
        if first != 0 or last != entries or least < 0:
            found = f"pointers go from {first} to {last} in steps of {least} or more"
            raise InputError(asked, found, f"0 to {entries}, never falling, would work")
        _check_columns(self.shape, self.rows(), self.columns.long())
        if not all_finite(self.values):
            raise InputError(asked, f"values are not finite in {self.values.dtype}", "finite float32 ones would work")

    @staticmethod
    def bytes_of(shape: tuple[int, int], entries: int, bits: int = 16) -> int:
        """What ``entries`` with values of ``bits`` take in a matrix of ``shape``, without making them."""
        index, pointer = index_dtype(shape[1]).itemsize, 4 if entries < 1 << 31 else 8
        return entries * (index + bits // 8) + (shape[0] + 1) * pointer

    def rows(self) -> Tensor:
        """The row of each entry, (entries,) int64."""
        at = torch.arange(self.shape[0], device=self.pointers.device)
        return at.repeat_interleave(self.pointers.long().diff())

    def dequantize(self) -> Tensor:
        weight = self.values.new_zeros(self.shape, dtype=torch.float32)
        weight[self.rows(), self.columns.long()] = self.values.float()
        return weight

    @property
    def nbytes(self) -> int:
        return _bytes(self.pointers, self.columns, self.values)


@dataclass(frozen=True, eq=False)
class Columns(Term):
    """``parts`` side by side, as many rows each; column j of that is column ``permutation[j]`` of the weight.

    Args:
        permutation: (columns,) uint16, int32 or int64: each column once.
        parts: terms of all columns together.

    Raises:
        InputError: any of that does not hold.
    """

    permutation: Tensor
    parts: tuple[Term, ...]

    @staticmethod
    def of(order: Tensor, parts: tuple[Term, ...]) -> Columns:
        """``parts`` of the columns in ``order``, (columns,) of any integers, kept in as few bits as do."""
        return Columns(order.to(index_dtype(len(order))), parts)

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self.parts]
        width, asked = sum(columns for _, columns in shapes), f"columns in parts of {shapes}"
        if len({rows for rows, _ in shapes}) != 1:
            raise InputError(asked, "they differ in rows, or there is none", "parts of as many rows would work")
        if self.permutation.dtype not in (torch.uint16, torch.int32, torch.int64):
            raise InputError(asked, f"a permutation in {self.permutation.dtype}", "uint16, int32, int64 would work")
        order = self.permutation.long().flatten().sort().values
        if self.permutation.shape != (width,) or not torch.equal(order, torch.arange(width, device=order.device)):
            found = f"a permutation {tuple(self.permutation.shape)} that is none of these"
            raise InputError(asked, found, f"each of 0 to {width - 1} once would work")

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.parts[0].shape[0], self.permutation.numel()

    def dequantize(self) -> Tensor:
        beside = torch.cat([part.dequantize() for part in self.parts], 1)
        weight = torch.empty_like(beside)
        weight[:, self.permutation.long()] = beside
        return weight

    @property
    def nbytes(self) -> int:
        return _bytes(self.permutation) + sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, eq=False)
class Terms(Term):
    """``diag(row_scale) (sum of terms) diag(column_scale)``.

    Args:
        shape: (rows, columns).
        terms: at least one, each of that shape.
        row_scale, column_scale: (rows,) and (columns,) finite floats, or None for ones.

    Raises:
        InputError: any of that does not hold.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None

    def __post_init__(self) -> None:
        shapes: Sequence[tuple[int, int]] = [term.shape for term in self.terms]
        if not shapes or any(shape != self.shape for shape in shapes):
            works = f"one or more of {self.shape} would work"
            raise InputError(f"a sum of terms of shape {self.shape}", f"terms are of {shapes}", works)
        _check_scale("row scale", self.row_scale, self.shape[0])
        _check_scale("column scale", self.column_scale, self.shape[1])

    def dequantize(self) -> Tensor:
        """Terms are added in their order, then scaled by rows, then by columns, in float32."""
        weight = self.terms[0].dequantize()
        for term in self.terms[1:]:
            weight = weight + term.dequantize()
        if self.row_scale is not None:
            weight = weight * self.row_scale.float()[:, None]
        return weight if self.column_scale is None else weight * self.column_scale.float()

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms) + _bytes(self.row_scale, self.column_scale)


def repack(weight: QTensor | Terms, layout_of: Callable[[Format], Layout]) -> QTensor | Terms:
    """``weight`` with every matrix in the layout that ``layout_of`` gives for its format; nothing is fitted again."""
    if isinstance(weight, QTensor):
        return weight.repack(layout_of(weight.format))

    def each(term: Term) -> Term:
        match term:
            case Dense():
                return Dense(term.qtensor.repack(layout_of(term.qtensor.format)))
            case Product():
                left, right = (matrix.repack(layout_of(matrix.format)) for matrix in (term.left, term.right))
                return Product(left, term.middle, right)
            case Columns():
                return Columns(term.permutation, tuple(map(each, term.parts)))
            case Terms():
                return replace(term, terms=tuple(map(each, term.terms)))
        return term

    return replace(weight, terms=tuple(map(each, weight.terms)))


def matrices(weight: QTensor | Term) -> list[QTensor]:
    """Every matrix in ``weight``, in the order in which they are written down."""
    match weight:
        case QTensor():
            return [weight]
        case Dense():
            return [weight.qtensor]
        case Product():
            return [weight.left, weight.right]
        case Columns():
            return [matrix for part in weight.parts for matrix in matrices(part)]
        case Terms():
            return [matrix for term in weight.terms for matrix in matrices(term)]
    return []


def has_sparse(term: Term) -> bool:
    """Whether any part of ``term`` is of few entries."""
    within = term.terms if isinstance(term, Terms) else term.parts if isinstance(term, Columns) else ()
    return isinstance(term, Sparse) or any(map(has_sparse, within))


def _bytes(*arrays: Tensor | None) -> int:
    return sum(array.nbytes for array in arrays if array is not None)


def _check_scale(name: str, scale: Tensor | None, length: int) -> None:
    if scale is None:
        return
    if scale.shape != (length,) or scale.dtype not in FLOATS:
        found = f"found {scale.dtype} {tuple(scale.shape)}"
        raise InputError(f"{name} of {length}", found, f"({length},) in a float of 16 or 32 bits would work")
    if not all_finite(scale):
        raise InputError(f"{name} of {length}", "it holds NaN or infinity", "finite scales would work")


def _check_columns(shape: tuple[int, int], rows: Tensor, columns: Tensor) -> None:
    """Raises InputError unless int64 ``columns`` (entries,) are in range, and rise where ``rows`` stay the same."""
    if not columns.numel():
        return
    asked, least, most = f"sparse entries of a {shape} matrix", int(columns.min()), int(columns.max())
    if least < 0 or most >= shape[1]:
        raise InputError(asked, f"columns go from {least} to {most}", f"0 to {shape[1] - 1} would work")
    stuck = (rows.diff() == 0) & (columns.diff() <= 0)
    if bool(stuck.any()):
        row = int(rows[1:][stuck][0])
        raise InputError(asked, f"row {row} has a column twice, or out of order", "columns that rise would work")
