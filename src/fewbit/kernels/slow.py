# SPDX-License-Identifier: Apache-2.0
"""A matrix that no native kernel runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.formats.fixed import Fixed
from fewbit.kernels import reference
from fewbit.kernels.prepared import PreparedMatrix
from fewbit.kernels.table import Kernel


class ReferencePrepared(PreparedMatrix):
    """Any format and layout, dequantized a few rows at a time at every call."""

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        self.kernel = kernel.name
        self._qtensor, self.shape, self.activation = qtensor, qtensor.shape, activation

    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if isinstance(self.activation, Fixed) and reference.multiplies_codes(self._qtensor):
            return reference.integer_linear(x, self._qtensor, self.activation, bias).to(dtype or x.dtype)
        rounded = reference.round_activations(x.float(), self.activation)
        return reference.linear(rounded, self._qtensor, bias).to(dtype or x.dtype)

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        return reference.decoded(self._qtensor)

    def qtensor(self) -> QTensor:
        return self._qtensor

    @property
    def nbytes(self) -> int:
        return self._qtensor.nbytes
