# SPDX-License-Identifier: Apache-2.0
"""Sums of terms, multiplied without making any of them: each part adds its product onto the same float32 result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.kernels.prepared import Prepared, PreparedMatrix
from fewbit.kernels.sparse import PreparedSparse, SparseKernel

Names = list[tuple[str, str]]
"""(what, the kernel that runs it) of each part."""


class _Part(ABC):
    """Abstract. One term, ready: x is (tokens, columns) in float32, bfloat16 or float16, y (tokens, rows) float32."""

    names: Names

    @abstractmethod
    def onto(self, x: Tensor, y: Tensor | None) -> Tensor:
        """``y + x W^T``, in place where there is a y."""

    @abstractmethod
    def backward(self, gradient: Tensor) -> Tensor:
        """``gradient W``, all float32."""

    @abstractmethod
    def term(self) -> Term:
        """What this was made from, in the layouts that are held here."""

    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """Bytes held, and bytes that one call with one token reads."""


class _Dense(_Part):
    def __init__(self, matrix: PreparedMatrix) -> None:
        self._matrix, self.names = matrix, [(matrix.qtensor().format.name, matrix.kernel)]

    def onto(self, x: Tensor, y: Tensor | None) -> Tensor:
        made = self._matrix.run(x, None, torch.float32)
        return made if y is None else y.add_(made)

    def backward(self, gradient: Tensor) -> Tensor:
        return self._matrix.backward(gradient)

    def term(self) -> Dense:
        return Dense(self._matrix.qtensor())

    def sizes(self) -> tuple[int, int]:
        return self._matrix.nbytes, self._matrix.read_bytes


class _Product(_Part):
    def __init__(self, left: PreparedMatrix, middle: Tensor | None, right: PreparedMatrix) -> None:
        self._left, self._right, self._stored = _Dense(left), _Dense(right), middle
        self._middle = None if middle is None else middle.float()
        both = self._right.names + self._left.names
        self.names = [(f"{what}, rank {left.shape[1]}", kernel) for what, kernel in both]

    def onto(self, x: Tensor, y: Tensor | None) -> Tensor:
        inner = self._right.onto(x, None)
        return self._left.onto(inner if self._middle is None else inner.mul_(self._middle), y)

    def backward(self, gradient: Tensor) -> Tensor:
        inner = self._left.backward(gradient)
        return self._right.backward(inner if self._middle is None else inner * self._middle)

    def term(self) -> Product:
        return Product(self._left.term().qtensor, self._stored, self._right.term().qtensor)

    def sizes(self) -> tuple[int, int]:
        return _total((self._left, self._right), self._middle)


class _Sparse(_Part):
    def __init__(self, entries: PreparedSparse) -> None:
        self._entries = entries
        sparse = entries.sparse
        share = sparse.values.numel() / (sparse.shape[0] * sparse.shape[1])
        self.names = [(f"sparse, {share:.2%} of entries", entries.kernel)]

    def onto(self, x: Tensor, y: Tensor | None) -> Tensor:
        y = x.new_zeros(x.shape[0], self._entries.sparse.shape[0], dtype=torch.float32) if y is None else y
        self._entries.add(x, y)
        return y

    def backward(self, gradient: Tensor) -> Tensor:
        return self._entries.backward(gradient)

    def term(self) -> Sparse:
        return self._entries.sparse

    def sizes(self) -> tuple[int, int]:
        return self._entries.nbytes, self._entries.read_bytes


class _Columns(_Part):
    def __init__(self, permutation: Tensor, widths: list[int], parts: list[_Part]) -> None:
        self._permutation, self._widths, self._parts = permutation.long(), widths, parts
        self._stored = permutation
        self.names = [name for part in parts for name in part.names]

    def onto(self, x: Tensor, y: Tensor | None) -> Tensor:
        beside = x.index_select(1, self._permutation).split(self._widths, 1)
        for part, columns in zip(self._parts, beside, strict=True):
            y = part.onto(columns, y)
        assert y is not None
        return y

    def backward(self, gradient: Tensor) -> Tensor:
        beside = torch.cat([part.backward(gradient) for part in self._parts], 1)
        x = torch.empty_like(beside)
        x[:, self._permutation] = beside
        return x

    def term(self) -> Columns:
        return Columns(self._stored, tuple(part.term() for part in self._parts))

    def sizes(self) -> tuple[int, int]:
        return _total(self._parts, self._permutation)


class _Sum(_Part):
    def __init__(self, terms: Terms, parts: list[_Part]) -> None:
        row_scale, column_scale = terms.row_scale, terms.column_scale
        self._shape, self._stored, self._given = terms.shape, (row_scale, column_scale), parts
        self._parts = sorted(parts, key=lambda part: isinstance(part, _Sparse))  # these want a y to add to
        self._row_scale = None if row_scale is None else row_scale.float()
        self._column_scale = None if column_scale is None else column_scale.float()
        self.names = [name for part in self._parts for name in part.names]

    def onto(self, x: Tensor, y: Tensor | None) -> Tensor:
        x = x if self._column_scale is None else x * self._column_scale
        made = y if self._row_scale is None else None
        for part in self._parts:
            made = part.onto(x, made)
        assert made is not None
        if self._row_scale is None:
            return made
        made *= self._row_scale
        return made if y is None else y.add_(made)

    def backward(self, gradient: Tensor) -> Tensor:
        gradient = gradient if self._row_scale is None else gradient * self._row_scale
        x = sum((part.backward(gradient) for part in self._parts[1:]), self._parts[0].backward(gradient))
        return x if self._column_scale is None else x * self._column_scale

    def term(self) -> Terms:
        return Terms(self._shape, tuple(part.term() for part in self._given), *self._stored)

    def sizes(self) -> tuple[int, int]:
        return _total(self._parts, self._row_scale, self._column_scale)


def _total(parts: list[_Part] | tuple[_Part, ...], *arrays: Tensor | None) -> tuple[int, int]:
    held, read = zip(*(part.sizes() for part in parts), strict=True)
    more = sum(array.nbytes for array in arrays if array is not None)
    return sum(held) + more, sum(read) + more


class PreparedTerms(Prepared):
    """A sum of terms. Every matrix in it runs on the best row for it; nothing is materialised.

    In order: x times the column scale (rounded to float32); matrices and products, each added to the float32 result of
    those before; sparse entries, added onto that in place; then the row scale, the bias, and one rounding to x's dtype.
    A product is x times the right factor, times the middle, times the left factor, its inner values float32.

    ``activation`` rounds, token by token, what is multiplied by a quantized matrix, where it is multiplied: x times the
    column scale for a matrix and for the right factor of a product (only its own columns for a part of ``Columns``),
    and the inner values, times the middle, for the left one. Sparse entries multiply x as it is.

    ``names``: (what, kernel) of each part, in the order in which they are computed.
    """

    def __init__(
        self,
        terms: Terms,
        matrix: Callable[[QTensor], PreparedMatrix],
        sparse: SparseKernel,
        activation: Format | None = None,
    ) -> None:
        def ready(term: Term) -> _Part:
            match term:
                case Dense():
                    return _Dense(matrix(term.qtensor))
                case Product():
                    return _Product(matrix(term.left), term.middle, matrix(term.right))
                case Sparse():
                    return _Sparse(PreparedSparse(term, sparse))
                case Columns():
                    widths = [part.shape[1] for part in term.parts]
                    return _Columns(term.permutation, widths, [ready(part) for part in term.parts])
                case Terms():
                    return total(term)
            raise TypeError(f"{type(term).__name__} is no term")

        def total(terms: Terms) -> _Sum:
            return _Sum(terms, [ready(part) for part in terms.terms])

        self.shape, self.activation, self._root = terms.shape, activation, total(terms)
        self.names = tuple(self._root.names)
        self.kernel = " + ".join(dict.fromkeys(kernel for _, kernel in self.names))

    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        y = self._root.onto(x.detach().reshape(-1, x.shape[-1]), None)
        if bias is not None:
            y += bias.detach().float()
        return y.to(dtype or x.dtype).reshape(*x.shape[:-1], self.shape[0])

    def backward(self, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        return self._root.backward(flat).to(gradient.dtype).reshape(*gradient.shape[:-1], self.shape[1])

    def weight(self) -> Terms:
        return self._root.term()

    @property
    def nbytes(self) -> int:
        return self._root.sizes()[0]

    @property
    def read_bytes(self) -> int:
        return self._root.sizes()[1]
