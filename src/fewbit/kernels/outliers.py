# SPDX-License-Identifier: Apache-2.0
"""A matrix ready to multiply activations of which the large ones stay float: :mod:`fewbit.formats.outliers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewbit.core.qtensor import QTensor
from fewbit.formats.outliers import Outliers
from fewbit.kernels.prepared import PreparedMatrix


class OutlierPrepared(PreparedMatrix):
    """Two products by the same codes: of integers, and, where a call has outliers at all, of floats."""

    def __init__(self, small: PreparedMatrix, large: PreparedMatrix, activation: Outliers) -> None:
        self._small, self._large, self._outliers = small, large, activation
        self.shape, self.activation = small.shape, activation
        self.kernel = f"{self._small.kernel} + {self._large.kernel}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._small, self._large, self._outliers)

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
        return self._small.nbytes + self._large.nbytes - shared * packed.nbytes
