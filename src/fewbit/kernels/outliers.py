# SPDX-License-Identifier: Apache-2.0
"""A matrix ready to multiply activations of which the large ones stay float: :mod:`fewbit.formats.outliers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.formats.outliers import Outliers
from fewbit.kernels.prepared import PreparedMatrix


class OutlierPrepared(PreparedMatrix):
    """Two products by the same codes: of integers, and, where a call has outliers at all, of floats."""

    def __init__(
        self, qtensor: QTensor, activation: Outliers, prepare: Callable[[QTensor, Format | None], PreparedMatrix]
    ) -> None:
        self._small = prepare(qtensor, activation.inner)
        self._large = prepare(self._small.qtensor(), None)
        self._outliers = activation
        self.shape, self.activation = qtensor.shape, activation
        self.kernel = f"{self._small.kernel} + {self._large.kernel}"

    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        small, large = self._outliers.split(x.detach().float())
        y = self._small.run(small, bias, torch.float32)
        if bool(large.any()):
            y += self._large.run(large, None, torch.float32)
        return y.to(dtype or x.dtype)

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        return self._large.decoded()

    def qtensor(self) -> QTensor:
        return self._small.qtensor()

    @property
    def nbytes(self) -> int:
        """The codes are held once."""
        packed = self.qtensor().packed
        shared = packed is self._large.qtensor().packed
        return self._small.nbytes + self._large.nbytes - shared * packed.numel() * packed.element_size()
