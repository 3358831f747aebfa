# SPDX-License-Identifier: Apache-2.0
"""A matrix of vectors ready to multiply by int8 activations: codes in vector16, books rounded to bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewbit.core import blocks as B
from fewbit.core.format import Format, Vectors
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native, pages, reference
from fewbit.kernels.alone import AlonePrepared, Call
from fewbit.kernels.levels import check_finite
from fewbit.kernels.table import Kernel
from fewbit.kernels.vector16 import LOOKED_UP, checked, fields
from fewbit.layouts.dense import load_params


def to_bytes(physical: Vectors) -> tuple[Tensor, Tensor, Tensor]:
    """Books as bytes: ``w ~ offset + step * (sum over books of byte)``.

    The books of a block share a step for each row of a vector, that row's ranges in all books together over 255, so
    that no sum of bytes passes 255. A weight is wrong by at most half a step a book: ``(range of the codebook + range
    of the residual) / 255``, or ``range / 510`` where there is one book. That is about what rounding activations to
    int8 costs.

    Returns:
        (bytes, step, offset): uint8, float32 (blocks, height) each. Bytes are (blocks, books, height, entries) where
        all indices have at most 8 bits: 64 entries where all have at most 6, else 256; fewer are repeated. Else
        (blocks, entries of both books one after the other, 8 or 16), each ``height`` bytes and zeros.
    """
    lowest = [book.double().amin(1) for book in physical.books]
    ranges = [book.double().amax(1) - low for book, low in zip(physical.books, lowest, strict=True)]
    step = sum(ranges, torch.zeros(())) / 255
    left, found = torch.full_like(step, 255), []
    for book, low in zip(physical.books, lowest, strict=True):
        whole = ((book.double() - low[:, None]) / step.where(step > 0, 1)[:, None]).round().minimum(left[:, None])
        left = left - whole.amax(1)
        found.append(whole.to(torch.uint8))
    return _arranged(found, max(physical.bits)), step.float(), sum(lowest, torch.zeros(())).float()


def _arranged(books: list[Tensor], most: int) -> Tensor:
    """``books``, each (blocks, entries, height), as kernels read them where the longest index has ``most`` bits."""
    if most > LOOKED_UP:
        height = books[0].shape[2]
        least = 1 << LOOKED_UP  # entries
        sizes = [(0, (8 if height <= 8 else 16) - height, 0, max(0, least - book.shape[1])) for book in books]
        return pages.held(torch.cat([pad(book, size) for book, size in zip(books, sizes, strict=True)], 1))
    entries = 64 if most <= 6 else 256
    return torch.stack([book.transpose(1, 2).repeat(1, 1, entries // book.shape[1]) for book in books], 1).contiguous()


class ByteVectorPrepared(AlonePrepared):
    """Codes in vector16; ``w`` is what :func:`to_bytes` makes of an entry of a book, or of the sum of two."""

    rounds_inputs = True

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        super().__init__(qtensor, kernel, activation)
        assert activation is not None
        self._x_block = B.width(self.shape[1], activation.block)
        format = self._stored.format
        self._packed = checked(format, self.shape, self._stored.packed)
        physical = format.physical(load_params(format, self.shape, self._stored.params))
        assert isinstance(physical, Vectors)
        check_finite(format, physical.books)
        self._bits = (*fields(format), 0)[:2]
        self._arrays = to_bytes(physical)
        self._block = min(B.width(self.shape[1], format.block), self.shape[1])

    @cached_property
    def _matrix(self) -> native.ByteVectorMatrix:
        addresses = (array.data_ptr() for array in (self._packed, *self._arrays))
        return (*self.shape, self._block, self._stored.format.height, *self._bits, *addresses)

    def _multiply(self, call: Call) -> None:
        native.core().vector_linear_int8(self._matrix, self._x_block, *call)

    def _read(self) -> tuple[Tensor, ...]:
        return self._packed, *self._arrays

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        """As :meth:`PreparedMatrix.decoded`: the weights as stored, whose entries are no bytes."""
        return reference.decoded(self._stored)
