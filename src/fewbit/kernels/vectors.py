# SPDX-License-Identifier: Apache-2.0
"""A matrix of vectors ready to multiply: codes in column8, codebooks as the kernel reads them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Vectors
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native, pages
from fewbit.kernels.alone import AlonePrepared, Call
from fewbit.kernels.column8 import TILE, checked, joint, lowered, tiles
from fewbit.kernels.decoded import rows_of_strip
from fewbit.kernels.levels import check_finite
from fewbit.kernels.table import Kernel
from fewbit.layouts.dense import load_params

SINGLE = 1 << 15
"""Bytes that the books of a block may take as float32: more leave the first-level cache, so float16 is read where it
holds all entries, which are no sums."""


def _width(height: int) -> int:
    """Numbers that an entry takes in memory."""
    return 4 if height <= 4 else 8 if height <= 8 else 16


class VectorPrepared(AlonePrepared):
    """Codes in column8; ``w`` is an entry of a book, or the sum of two, of ``height`` rows of a column."""

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        super().__init__(qtensor, kernel, activation)
        format = self._stored.format
        self._packed = checked(format, self.shape, self._stored.packed)
        physical = format.physical(load_params(format, self.shape, self._stored.params))
        assert isinstance(physical, Vectors)
        check_finite(format, physical.books)
        summed = joint(format, self.shape)
        physical = lowered(physical, summed)
        self._bits = (*physical.bits, 0)[:2]
        width = _width(format.height)
        small = 4 * width * sum(1 << bits for bits in physical.bits) <= SINGLE
        single = small or summed or kernel.isa == "serial"  # no float16 holds a sum
        dtype = torch.float32 if single else torch.float16  # what serial would convert by hand
        self._books = [torch.nn.functional.pad(book.to(dtype), (0, width - format.height)) for book in physical.books]
        self._block = min(B.width(self.shape[1], format.block), self.shape[1])

    @cached_property
    def _matrix(self) -> native.VectorMatrix:
        half = int(self._books[0].dtype == torch.float16)
        addresses = (*(book.data_ptr() for book in self._books), 0)[:2]
        height = self._stored.format.height
        return (*self.shape, self._block, height, *self._bits, half, self._packed.data_ptr(), *addresses)

    def _multiply(self, call: Call) -> None:
        native.core().vector_linear(self._matrix, *call)

    def _read(self) -> tuple[Tensor, ...]:
        return self._packed, *self._books

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        """As :meth:`PreparedMatrix.decoded`; a strip is a view of memory that the next one overwrites."""
        rows, columns = self.shape
        tile, count = TILE * self._stored.format.height, tiles(self._stored.format, self.shape)
        step = min(count, rows_of_strip(columns, tile) // tile)
        weight = pages.fresh(columns, step * tile)  # (columns, rows of the strip)
        for first in range(0, count, step):
            last, row = min(first + step, count), first * tile
            native.core().vector_decode(
                self._matrix, first, last, weight.data_ptr(), weight.shape[1], self._isa, torch.get_num_threads()
            )
            yield slice(row, min(last * tile, rows)), weight[:, : min(step * tile, rows - row)].T
