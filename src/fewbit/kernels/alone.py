# SPDX-License-Identifier: Apache-2.0
"""What matrices in layouts of their own have in common: each is one call of the core."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native, pages, reference
from fewbit.kernels.copies import Addressed
from fewbit.kernels.decoded import DECODED, multiply_decoded
from fewbit.kernels.inputs import given
from fewbit.kernels.prepared import PreparedMatrix, stored
from fewbit.kernels.table import Kernel

Call = tuple[native.Input, int, int, int, int, int, int]
"""Of a product: x, addresses of the bias (0: none) and of y, elements from row to row of y, its dtype, ISA, threads."""


class AlonePrepared(Addressed, PreparedMatrix):
    """Abstract: codes in a layout of their own, multiplied by a call of their own; many tokens through decoded
    weights, unless the kernel rounds its inputs itself (``rounds_inputs``)."""

    rounds_inputs: ClassVar[bool] = False

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        assert kernel.isa is not None
        self.kernel, self.shape, self.activation = kernel.name, qtensor.shape, activation
        self._isa = native.FLAGS[kernel.isa]
        self._stored = stored(qtensor, kernel)

    @abstractmethod
    def _multiply(self, call: Call) -> None:
        """Write ``x W^T + bias`` to y, (tokens, rows)."""

    @abstractmethod
    def _read(self) -> tuple[Tensor, ...]:
        """What a call reads of the matrix, codes first."""

    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        leading, dtype, (rows, columns) = x.shape[:-1], dtype or x.dtype, self.shape
        if self.activation is not None and not self.rounds_inputs:
            x = reference.round_activations(x.float(), self.activation)
        bias = None if bias is None else bias.float().contiguous()
        if x.numel() >= DECODED * columns and not self.rounds_inputs:
            return multiply_decoded(self, x, bias).to(dtype).reshape(*leading, rows)
        x, address = given(x)
        y = pages.fresh(*leading, rows, dtype=dtype)
        addresses = (0 if bias is None else bias.data_ptr(), y.data_ptr())
        self._multiply((address, *addresses, rows, native.DTYPES[dtype], self._isa, torch.get_num_threads()))
        return y

    def qtensor(self) -> QTensor:
        return self._stored

    @property
    def read_bytes(self) -> int:
        return sum(t.nbytes for t in self._read())

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes + self.read_bytes - self._stored.packed.numel()
