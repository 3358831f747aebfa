# SPDX-License-Identifier: Apache-2.0
"""Weights as structs of ``fewbit_decode.h``: one matrix as a row of the kernel table reads it, or a tree of them."""

from __future__ import annotations

import ctypes as C
import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit import kernels
from fewbit.core.format import Format, code_shape
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.decode import structs as S
from fewbit.errors import UnsupportedError
from fewbit.formats.affine import Affine
from fewbit.formats.fixed import Fixed
from fewbit.kernels import native
from fewbit.kernels.byte_vectors import ByteVectorPrepared
from fewbit.kernels.outliers import OutlierPrepared
from fewbit.kernels.prepared import PreparedMatrix
from fewbit.kernels.row_tables import RowLevelsPrepared, RowTablesPrepared
from fewbit.kernels.sparse import PreparedSparse
from fewbit.kernels.tiled import NativePrepared
from fewbit.kernels.vectors import VectorPrepared
from fewbit.layouts.dense import DENSE, load_params

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOOKED_UP = (S.TILED, S.CODEBOOK, S.DENSE, S.ROW_TABLES)
"""Kinds whose rows can be looked up, as those of an embedding are."""
WHOLE_ROW = 1 << 31
"""A block of more columns than there are."""


@dataclass
class Builder:
    """Makes the structs of one layer.

    * ``name``: of the layer, for what is said of it. ``activation``: what its inputs are rounded to, or None.
    * ``kept``: what structs point to, which must live as long as they do. ``read_bytes``: of all that was made, that
      one token reads.
    """

    name: str
    activation: Format | None
    kept: list[Any] = field(default_factory=list)
    read_bytes: int = 0

    def weight(self, weight: QTensor | Terms, bias: Tensor | None = None) -> S.Weight:
        """One matrix or a sum of terms, with its bias, float32 (rows,).

        Raises:
            UnsupportedError: no native kernel runs a matrix in it, or none rounds its inputs.
        """
        if isinstance(weight, QTensor):
            return self._matrix(weight, bias)
        made = self._term(weight)
        made.bias = None if bias is None else self._keep(bias)
        return made

    def _term(self, term: Term) -> S.Weight:
        match term:
            case Dense():
                return self._matrix(term.qtensor)
            case Product():
                factors = self._weights([Dense(term.right), Dense(term.left)])
                return self._tree(S.PRODUCT, term, factors, middle=self._floats(term.middle))
            case Sparse():
                return self._sparse(term)
            case Columns():
                order = term.permutation.to(torch.int32).contiguous()
                self.read_bytes += order.nbytes
                return self._tree(S.COLUMNS, term, self._weights(list(term.parts)), order=self._keep(order))
            case Terms():
                terms = sorted(term.terms, key=lambda part: isinstance(part, Sparse))  # as PreparedTerms adds them
                scales = {name: self._floats(getattr(term, name)) for name in ("row_scale", "column_scale")}
                return self._tree(S.SUM, term, self._weights(terms), **scales)
        raise TypeError(f"{type(term).__name__} is no term")

    def _weights(self, terms: list[Term]) -> Any:
        return self._array([self._term(term) for term in terms])

    def _array(self, weights: list[S.Weight]) -> Any:
        made = (S.Weight * len(weights))(*weights)
        self.kept.append(made)
        return made

    def _tree(self, kind: int, term: Term, parts: Any, **members: Any) -> S.Weight:
        rows, columns = term.shape
        return S.Weight(kind=kind, rows=rows, columns=columns, term=parts, terms=len(parts), **members)

    def _sparse(self, sparse: Sparse) -> S.Weight:
        row = kernels.choose_sparse()
        if row.isa is None:
            raise UnsupportedError(f"the native runtime for {self.name}", "no kernel here adds sparse entries")
        prepared = PreparedSparse(sparse, row)
        self.kept.append(prepared)
        self.read_bytes += prepared.read_bytes
        rows, columns = sparse.shape
        entries = self._pointer(S.Sparse(*prepared._matrix))
        return S.Weight(kind=S.SPARSE, isa=prepared._isa, rows=rows, columns=columns, sparse=entries)

    def _matrix(self, qtensor: QTensor, bias: Tensor | None = None) -> S.Weight:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what it warns of is refused here
            prepared = kernels.prepare(unpacked(qtensor), activation=self.activation)
        return self._prepared(prepared, bias)

    def _prepared(self, prepared: PreparedMatrix, bias: Tensor | None = None) -> S.Weight:
        self.kept.append(prepared)
        rows, columns = prepared.shape
        if prepared.activation is not None and prepared.activation.whole:
            found = f"{prepared.activation.name} is one scale for all tokens of a call, whose company here changes"
            works = "int8/channel, a scale a token, or int8/static, one that calibration fixes"
            raise UnsupportedError(f"the native runtime for {self.name}", found, works)
        if isinstance(prepared, OutlierPrepared):
            both = self._array([self._prepared(prepared._small, bias), self._prepared(prepared._large)])
            threshold = prepared._outliers.threshold
            return S.Weight(kind=S.OUTLIERS, rows=rows, columns=columns, term=both, terms=2, threshold=threshold)
        made = S.Weight(rows=rows, columns=columns, isa=getattr(prepared, "_isa", 0))
        match prepared:
            case NativePrepared():
                made.kind, made.x_block = S.TILED, prepared._x_block
                matrices = [S.Matrix(*members) for _, members in prepared._matrices]
                tiled = (S.Matrix * len(matrices))(*matrices)
                self.kept.append(tiled)
                made.tiled, made.parts = tiled, len(matrices)
                made.x_scale, made.x_zero = prepared._grid
                if prepared._addend is not None:
                    bias = prepared._addend if bias is None else prepared._addend + bias
            case VectorPrepared():
                made.kind, made.codebook = S.CODEBOOK, S.Vectors(*prepared._matrix)
            case ByteVectorPrepared():
                made.kind, made.x_block = S.BYTE_CODEBOOK, prepared._x_block
                made.bytes = self._pointer(S.ByteVectors(*prepared._matrix))
            case RowLevelsPrepared():
                made.kind, made.row_levels = S.ROW_LEVELS, self._pointer(S.RowLevels(*prepared._integers))
            case RowTablesPrepared():
                made.kind, made.row_tables = S.ROW_TABLES, self._pointer(S.RowTables(*prepared._matrix))
            case _:
                found = f"{prepared.qtensor().format.name} runs on {prepared.kernel}"
                raise UnsupportedError(f"the native runtime for {self.name}", found, "a native kernel")
        self.read_bytes += prepared.read_bytes
        made.bias = None if bias is None else self._keep(bias)
        if prepared.activation is not None and not prepared.rounds_inputs:
            made.rounding = self._rounding(prepared.activation, prepared.qtensor().format)
        return made

    def _rounding(self, activation: Format, format: Format) -> Any:
        made = rounding(activation)
        if made is None:
            found = f"no kernel multiplies {format.name} by {activation.name}"
            raise UnsupportedError(f"the native runtime for {self.name}", found, "leave inputs float")
        return self._pointer(made)

    def _pointer(self, made: C.Structure) -> Any:
        self.kept.append(made)
        return C.pointer(made)

    def _floats(self, values: Tensor | None) -> int | None:
        """The address of ``values`` as float32, or None."""
        if values is None:
            return None
        self.read_bytes += 4 * values.numel()
        return self._keep(values.float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()


@functools.lru_cache
def rounding(activation: Format) -> S.Rounding | None:
    """How the runtime rounds inputs to ``activation`` before a kernel of floats multiplies them; None: it cannot. The
    same struct for the same format: layers that share it share what is rounded."""
    if isinstance(activation, Fixed) and activation.bits > 1:
        return S.Rounding(activation.bits, 0, WHOLE_ROW, 1.0, activation.scale, activation.zero)
    if isinstance(activation, Affine) and activation.bits > 1:
        block = activation.block or WHOLE_ROW
        return S.Rounding(activation.bits, int(activation.symmetric), block, activation.clip)
    return None


def unpacked(qtensor: QTensor) -> QTensor:
    """The same matrix, its codes a byte each where they lie as in a file and have no more than 8 bits."""
    format = qtensor.format
    if qtensor.layout is not DENSE or format.bits > 8 or format.height > 1:
        return qtensor
    codes = codes_of(qtensor.packed, qtensor.shape, format)
    return QTensor.of(format, codes, load_params(format, qtensor.shape, qtensor.params))


def codes_of(packed: Tensor, shape: tuple[int, int], format: Format) -> Tensor:
    """Codes (rows, columns / dim) of the layout ``dense``, as :func:`fewbit.layouts.dense.unpack_rows` reads them."""
    rows, columns = code_shape(format, shape)
    codes = packed.new_empty(rows, columns, dtype=torch.uint8)
    threads = torch.get_num_threads()
    native.core().fields_unpack(packed.data_ptr(), rows, columns, format.bits, codes.data_ptr(), threads)
    return codes


def dense(tensor: Tensor) -> S.Weight:
    """The struct of a matrix (rows, columns) that is not quantized, which must stay alive.

    Raises:
        UnsupportedError: of another dtype than :data:`FLOATS`.
    """
    if tensor.dtype not in FLOATS or tensor.ndim != 2 or not tensor.is_contiguous():
        raise UnsupportedError("the native runtime", f"a matrix of {tensor.dtype} {tuple(tensor.shape)}")
    rows, columns = tensor.shape
    dtype, address = native.DTYPES[tensor.dtype], tensor.data_ptr()
    return S.Weight(kind=S.DENSE, dtype=dtype, rows=rows, columns=columns, dense=address)
