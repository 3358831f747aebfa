# SPDX-License-Identifier: Apache-2.0
"""Matrices whose rows have tables of their own, ready to multiply: codes in row16, tables and scales beside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Physical
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native, pages
from fewbit.kernels.alone import AlonePrepared, Call
from fewbit.kernels.arranged import ROWHALVES16
from fewbit.kernels.decoded import rows_of_strip
from fewbit.kernels.inputs import CENTRE
from fewbit.kernels.levels import check_finite, nearest_bytes
from fewbit.kernels.row16 import LANES
from fewbit.kernels.table import Kernel


class RowTablesPrepared(AlonePrepared):
    """``w = scale * table[code]``, a table for each ``group_rows`` rows, a scale for each block of a row."""

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        super().__init__(qtensor, kernel, activation)
        format, (rows, columns) = self._stored.format, self.shape
        physical = format.physical(self._stored.logical()[1])
        assert isinstance(physical, Physical) and physical.table is not None
        check_finite(format, [physical.table])
        self._halves = int(self._stored.layout == ROWHALVES16)
        self._block = min(B.width(columns, format.block), columns)
        self._scale = pages.held(physical.scale.float().expand(rows, B.count(columns, format.block)).contiguous())
        tables = physical.table.float().expand(rows, -1)[:: format.group_rows].contiguous()
        half = tables.half()
        self._table = pages.held(half if torch.equal(half.float(), tables) else tables)

    @cached_property
    def _matrix(self) -> native.RowTables:
        format, half = self._stored.format, int(self._table.dtype == torch.float16)
        arrays = (t.data_ptr() for t in (self._stored.packed, self._table, self._scale))
        return (*self.shape, self._block, format.group_rows, format.bits, half, *arrays, self._halves)

    def _multiply(self, call: Call) -> None:
        native.core().row_linear(self._matrix, *call)

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        """As :meth:`PreparedMatrix.decoded`; a strip is memory that the next one overwrites."""
        rows, columns = self.shape
        step = min(rows, rows_of_strip(columns, 1))
        weight = pages.fresh(step, columns)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            native.core().row_decode(
                self._matrix, first, last, weight.data_ptr(), columns, self._isa, torch.get_num_threads()
            )
            yield slice(first, last), weight[: last - first]

    def _read(self) -> tuple[Tensor, ...]:
        return self._stored.packed, self._table, self._scale


class RowLevelsPrepared(RowTablesPrepared):
    """The same with tables as integers of 8 bits, for inputs that the kernel rounds to int8; one scale a row and a
    token. Levels are wrong by at most 1/254 of the largest of their table."""

    rounds_inputs = True

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        super().__init__(qtensor, kernel, activation)
        levels, step = nearest_bytes(self._table.float())
        self._levels = pages.held((levels + CENTRE).to(torch.uint8).repeat(1, LANES)[:, :LANES])
        rows, each = self.shape[0], self._stored.format.group_rows
        self._factor = (self._scale[:, 0] * step.repeat_interleave(each)[:rows]).contiguous()

    @cached_property
    def _integers(self) -> native.RowLevels:
        format = self._stored.format
        arrays = (t.data_ptr() for t in (self._stored.packed, self._levels, self._factor))
        return (*self.shape, format.group_rows, format.bits, *arrays, self._halves)

    def _multiply(self, call: Call) -> None:
        native.core().row_linear_int8(self._integers, *call)

    def _read(self) -> tuple[Tensor, ...]:
        return self._stored.packed, self._levels, self._factor

    @property
    def nbytes(self) -> int:
        """Tables and scales are held too, to decode the weights."""
        return super().nbytes + sum(t.nbytes for t in (self._table, self._scale))
