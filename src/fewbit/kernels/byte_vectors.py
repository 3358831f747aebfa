# SPDX-License-Identifier: Apache-2.0
"""A matrix of vectors ready to multiply by int8 activations: codes in vector16, books rounded to bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Vectors
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native, reference
from fewbit.kernels.inputs import given
from fewbit.kernels.prepared import Addressed, PreparedMatrix
from fewbit.kernels.table import Kernel
from fewbit.kernels.vector16 import VECTOR16, checked
from fewbit.layouts.dense import load_params


def to_bytes(physical: Vectors) -> tuple[Tensor, Tensor, Tensor]:
    """Books as bytes: ``w ~ offset + step * (sum over books of byte)``.

    The books of a block share a step for each row of a vector, that row's ranges in all books together over 255, so
    that no sum of bytes passes 255. A weight is wrong by at most half a step a book: ``(range of the codebook + range
    of the residual) / 255``, or ``range / 510`` where there is one book. That is about what rounding activations to
    int8 costs.

    Returns:
        (bytes, step, offset): uint8 (blocks, books, height, entries), float32 (blocks, height) each. There are 64
        entries where all indices have at most 6 bits, else 256; fewer are repeated.
    """
    lowest = [book.double().amin(1) for book in physical.books]
    ranges = [book.double().amax(1) - low for book, low in zip(physical.books, lowest, strict=True)]
    step = sum(ranges, torch.zeros(())) / 255
    left, found = torch.full_like(step, 255), []
    for book, low in zip(physical.books, lowest, strict=True):
        whole = ((book.double() - low[:, None]) / step.where(step > 0, 1)[:, None]).round().minimum(left[:, None])
        left = left - whole.amax(1)
        found.append(whole.to(torch.uint8).transpose(1, 2))
    entries = 64 if max(physical.bits) <= 6 else 256
    books = [book.repeat(1, 1, entries // book.shape[2]) for book in found]
    return torch.stack(books, 1).contiguous(), step.float(), sum(lowest, torch.zeros(())).float()


class ByteVectorPrepared(Addressed, PreparedMatrix):
    """Codes in vector16; ``w`` is what :func:`to_bytes` makes of an entry of a book, or of the sum of two."""

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        assert kernel.isa is not None and activation is not None
        self.kernel, self.shape, self.activation = kernel.name, qtensor.shape, activation
        self._isa = native.FLAGS[kernel.isa]
        self._x_block = B.width(self.shape[1], activation.block)
        self._stored = qtensor if qtensor.layout is VECTOR16 else qtensor.repack(VECTOR16)
        format = self._stored.format
        self._packed = checked(format, self.shape, self._stored.packed)
        physical = format.physical(load_params(format, self.shape, self._stored.params))
        assert isinstance(physical, Vectors)
        self._bits = (*physical.bits, 0)[:2]
        self._arrays = to_bytes(physical)
        self._block = min(B.width(self.shape[1], format.block), self.shape[1])

    @cached_property
    def _matrix(self) -> native.ByteVectorMatrix:
        addresses = (array.data_ptr() for array in (self._packed, *self._arrays))
        return (*self.shape, self._block, self._stored.format.height, *self._bits, *addresses)

    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        leading, dtype, rows = x.shape[:-1], dtype or x.dtype, self.shape[0]
        bias = None if bias is None else bias.float().contiguous()
        x, address = given(x)
        y = torch.empty(*leading, rows, dtype=dtype)
        native.core().vector_linear_int8(
            self._matrix,
            self._x_block,
            address,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            native.DTYPES[dtype],
            self._isa,
            torch.get_num_threads(),
        )
        return y

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        """As :meth:`PreparedMatrix.decoded`: the weights as stored, whose entries are no bytes."""
        return reference.decoded(self._stored)

    def qtensor(self) -> QTensor:
        return self._stored

    @property
    def read_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._packed, *self._arrays))

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes + self.read_bytes - self._packed.numel()
