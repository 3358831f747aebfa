# SPDX-License-Identifier: Apache-2.0
"""Matrices of tiles of 16 rows, which the core multiplies: each by itself, or several with the same inputs at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Physical
from fewbit.core.qtensor import QTensor
from fewbit.formats.fixed import Fixed
from fewbit.kernels import native, pages, reference
from fewbit.kernels.arranged import BYTES16, HALVES16
from fewbit.kernels.copies import Addressed
from fewbit.kernels.decoded import DECODED, multiply_decoded, rows_of_strip
from fewbit.kernels.inputs import CENTRE, exact, given, grid_of_call, wants_gradients
from fewbit.kernels.levels import as_integers, check_finite
from fewbit.kernels.prepared import Prepared, PreparedMatrix, stored
from fewbit.kernels.table import Kernel, refuse_blocks
from fewbit.kernels.tile16 import ROWS

AS_BFLOAT16 = 8
"""Tokens from which on bfloat16 activations are multiplied as such, where the processor can; for fewer it is slower."""


def _tiles(values: Tensor) -> Tensor:
    """(rows, blocks) -> (tiles, blocks, 16), in float16 where that loses nothing."""
    values = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    values = values.reshape(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
    half = values.half()
    return pages.held(half if torch.equal(half.float(), values) else values)


def _shared_zero(scale: Tensor, offset: Tensor) -> float | None:
    """z such that ``offset == -scale * z`` bit for bit everywhere, for a z of whole halves; None when there is none."""
    ratio = float(-offset.flatten()[0] / scale.flatten()[0])
    zero = round(2 * ratio) / 2 if abs(ratio) < 2**20 else 0.0
    return zero if torch.equal(-scale * zero, offset) else None


class NativePrepared(Addressed, PreparedMatrix):
    """Tiles of codes; ``w = scale * (table[code] - zero) + offset`` with scale and offset (tiles, blocks, 16).

    Where groups of rows have a table each, they are whole tiles, and each group is a matrix to the core.
    """

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        assert kernel.isa is not None and kernel.weights is not None
        self.kernel, self.shape, self.activation = kernel.name, qtensor.shape, activation
        self._isa = native.FLAGS[kernel.isa]
        self._family = native.FAMILIES[kernel.weights]
        self._x_block = 0  # of float products; any other kernel rounds x itself
        if kernel.family == "xnor":
            self._x_block = native.SIGNS
        elif kernel.family in ("int24", "int24_lut"):
            self._x_block = native.INT24
        elif kernel.integers and activation is not None:
            self._x_block = B.width(self.shape[1], activation.block)
        self._stored = stored(qtensor, kernel)
        format = self._stored.format
        physical = format.physical(qtensor.logical()[1])
        assert isinstance(physical, Physical)
        blocks = (self.shape[0], B.count(self.shape[1], format.block))
        scale = physical.scale.float().expand(blocks)
        offset = None if physical.offset is None else physical.offset.float().expand(blocks)
        zero = 0.5 if self._x_block == native.SIGNS else None
        if offset is not None and physical.table is None and zero is None:
            zero = _shared_zero(scale, offset)
        self._zero = zero or 0.0
        self._scale = _tiles(scale)
        self._offset = None if offset is None or zero is not None else _tiles(offset)
        self._table = self._levels = None  # as they are, and as they are multiplied
        if physical.table is not None:
            check_finite(format, [physical.table])
            tables = physical.table.reshape(-1, physical.table.shape[-1])[:: format.group_rows or self.shape[0]]
            self._table = torch.nn.functional.pad(tables, (0, 2**format.bits - tables.shape[1])).contiguous()
            self._levels = as_integers(self._table) if kernel.family == "int8_lut" else self._table
        self._block = min(B.width(self.shape[1], format.block), self.shape[1])
        self._by_sums = kernel.name == "affine_linear_avx512" and format.bits == 1  # that is faster than decoding
        exact = kernel.name == "int24_linear_avx512vnni" or (self._by_sums and not refuse_blocks(self.shape, format))
        self._as_bfloat16 = exact and "avx512bf16" in native.isas()
        self._grid = (0.0, 0)  # scale and zero that all activations have; none
        self._addend: Tensor | None = None
        self._whole = activation if self.rounds_inputs and activation is not None and activation.whole else None
        if isinstance(activation, Fixed) and self.rounds_inputs:
            self._grid = (activation.scale, activation.zero)
            if activation.zero != CENTRE:
                # of the levels that are multiplied: what stands for 0 times them is 0
                sums = reference.row_sums(self._strips(self._levels), self.shape[0])
                self._addend = activation.scale * (CENTRE - activation.zero) * sums.float()
        self.company = (self._isa, self._x_block, activation, self._by_sums, self._as_bfloat16)

    @cached_property
    def _matrices(self) -> tuple[tuple[int, native.Matrix], ...]:
        """(first row, rows that share a table): one matrix unless groups of rows have their own."""
        return self._with(self._levels)

    def _with(self, tables: Tensor | None) -> tuple[tuple[int, native.Matrix], ...]:
        if tables is None or len(tables) == 1:
            return ((0, self._matrix(0, self.shape[0], tables)),)
        each, rows = self._stored.format.group_rows, self.shape[0]
        return tuple(
            (first, self._matrix(first, min(first + each, rows), table))
            for first, table in zip(range(0, rows, each), tables, strict=True)
        )

    def _matrix(self, first: int, last: int, table: Tensor | None) -> native.Matrix:
        """Rows [first, last), from a tile's first on."""
        tile, offset = first // ROWS, self._offset
        return (
            last - first,
            self.shape[1],
            self._block,
            self._stored.format.bits,
            self._family,
            int(self._scale.dtype == torch.float16),
            int(offset is not None and offset.dtype == torch.float16),
            self._zero,
            self._stored.packed[tile].data_ptr(),
            self._scale[tile].data_ptr(),
            0 if offset is None else offset[tile].data_ptr(),
            0 if table is None else table.data_ptr(),
            int(self._stored.layout in (HALVES16, BYTES16)),
        )

    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        return _run_native(x, [(self, bias)], dtype)[0]

    def _route(self, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
        """(x_block, instruction set) of a call with so many tokens."""
        if self._as_bfloat16 and dtype == torch.bfloat16 and tokens >= AS_BFLOAT16:
            return native.BFLOAT16S, native.FLAGS["avx512bf16"]
        decoded = torch.get_num_threads() > 1 or self._isa == native.FLAGS["avx2"]
        if self._x_block == native.INT24 and tokens >= DECODED and decoded:
            return 0, self._isa
        return self._x_block, self._isa

    def inputs(self, x: Tensor) -> Tensor:
        rounded = super().inputs(x)
        dtype = x.dtype if self.activation is None else torch.float32
        integers = self._route(dtype, x.numel() // self.shape[1])[0] == native.INT24
        return reference.int24(rounded) if integers and self._table is None else rounded

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        return self._strips(self._table)

    def _strips(self, tables: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`decoded`, by these levels; a strip is a view of memory that the next one overwrites."""
        rows, columns = self.shape
        strip, matrices = rows_of_strip(columns, ROWS), self._with(tables)
        weight = pages.fresh(columns, min(strip, -(-rows // ROWS) * ROWS))  # (columns, rows of the strip)
        for row in range(0, rows, strip):
            last = min(row + strip, rows)
            for first, matrix in matrices:
                begin, end = max(row, first), min(last, first + matrix[0])
                if begin < end:
                    tiles = (begin - first) // ROWS, -(-(end - first) // ROWS)
                    out = weight[:, begin - row :].data_ptr(), weight.shape[1]
                    native.core().decode(matrix, *tiles, *out, self._isa, torch.get_num_threads())
            yield slice(row, last), weight[:, : last - row].T

    def qtensor(self) -> QTensor:
        return self._stored

    @property
    def rounds_inputs(self) -> bool:
        """Whether the kernel itself rounds activations to :attr:`activation`."""
        return self._x_block not in (0, native.INT24)

    @property
    def unit(self) -> int:
        """Rows that :meth:`tiles` must not cut: those of a tile, or that share a table, or whose scales are coded
        together."""
        format = self._stored.format
        if format.chunk:
            return math.lcm(ROWS, format.chunk // math.gcd(format.chunk, B.count(self.shape[1], format.block)))
        return format.group_rows if format.group_rows > 1 else ROWS

    def tiles(self, begin: int, end: int) -> NativePrepared:
        """Tiles of 16 rows [begin, end) as a matrix of its own, in the same memory; both at whole :attr:`unit`."""
        stored, made = self._stored, copy.copy(self)
        rows = slice(begin * ROWS, min(end * ROWS, self.shape[0]))
        groups = slice(rows.start // self.unit, -(-rows.stop // self.unit))
        cuts = {p.name: groups if p.per == "rows" else slice(None) if p.shared else rows for p in stored.format.params}
        params = {name: values[cuts[name]] for name, values in stored.params.items()}
        for name in (p.name for p in stored.format.params if p.per == "chunk"):
            blocks, chunk = B.count(self.shape[1], stored.format.block), stored.format.chunk
            params[name] = stored.params[name][:, rows.start * blocks // chunk : -(-rows.stop * blocks // chunk)]
        if self._table is not None and self._levels is not None and len(self._table) > 1:
            made._table, made._levels = self._table[groups], self._levels[groups]
        made.shape = rows.stop - rows.start, self.shape[1]
        made._stored = QTensor(stored.format, stored.layout, made.shape, stored.packed[begin:end], params)
        made._scale = self._scale[begin:end]
        made._offset = None if self._offset is None else self._offset[begin:end]
        made._addend = None if self._addend is None else self._addend[rows]
        return made

    @property
    def read_bytes(self) -> int:
        held = (self._stored.packed, self._scale, self._offset, self._table, self._addend)
        read = (t for t in held if t is not None)
        return sum(t.nbytes for t in read)

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes - self._stored.packed.numel() + self.read_bytes


@exact
def linear_many(x: Tensor, matrices: Sequence[Prepared], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """``[prepared(x, bias) for prepared, bias in zip(matrices, biases)]``, bit for bit: x (..., columns) -> one
    (..., rows) a matrix, in x's dtype. Neighbours that one kernel runs, with inputs rounded alike, are computed
    together: x is laid out or rounded once, and threads meet once.

    Raises:
        InputError, UnsupportedError: as :meth:`Prepared.__call__`.
        ValueError: there are not as many biases as matrices.
    """
    pairs = list(zip(matrices, biases, strict=True))
    if wants_gradients(x, *biases):
        return [matrix(x, bias) for matrix, bias in pairs]
    for matrix, bias in pairs:
        matrix.check(x, bias)
    ys: list[Tensor] = []
    for company, run in groupby(pairs, lambda pair: pair[0].company):
        beside = list(run)
        ys += [matrix.run(x, bias) for matrix, bias in beside] if company is None else _run_native(x, beside)
    return ys


def _run_native(
    x: Tensor, pairs: Sequence[tuple[Any, Tensor | None]], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """(matrix, bias) pairs of :class:`NativePrepared` of one company, as :meth:`Prepared.run`."""
    first: NativePrepared = pairs[0][0]
    leading, dtype, columns = x.shape[:-1], dtype or x.dtype, first.shape[1]
    if first.activation is not None and not first.rounds_inputs:
        x = reference.round_activations(x.float(), first.activation)
    ys, tokens = list[Tensor](), x.numel() // columns
    x_block, isa = first._route(x.dtype, tokens)
    if tokens >= DECODED and not x_block and not first._by_sums:
        for matrix, bias in pairs:
            ys.append(multiply_decoded(matrix, x, bias).to(dtype).reshape(*leading, matrix.shape[0]))
        return ys
    grid = first._grid if first._whole is None else grid_of_call(x, first._whole)
    if math.isnan(grid[0]):
        return [torch.full((*leading, matrix.shape[0]), torch.nan, dtype=dtype) for matrix, _ in pairs]
    x, address = given(x)
    outputs, kept = [], []
    for matrix, bias in pairs:
        if matrix._addend is not None:
            bias = matrix._addend if bias is None else matrix._addend + bias
        if bias is not None:
            bias = bias.float().contiguous()
            kept.append(bias)  # alive until the call
        rows = matrix.shape[0]
        y = pages.fresh(*leading, rows, dtype=dtype)
        ys.append(y)
        for row, part in matrix._matrices:
            addend = 0 if bias is None else bias.data_ptr() + row * bias.element_size()
            outputs.append((part, addend, y.data_ptr() + row * y.element_size(), rows))
    call = (tuple(outputs), address, x_block, native.DTYPES[dtype], isa, torch.get_num_threads(), *grid)
    native.core().linear_many(*call)
    return ys
