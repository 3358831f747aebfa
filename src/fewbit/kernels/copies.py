# SPDX-License-Identifier: Apache-2.0
"""Copies of what is prepared: addresses are of one process, and arrays lie in chunks of memory with those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fewbit.core.format import Format
from fewbit.core.layout import Shape
from fewbit.core.qtensor import QTensor
from fewbit.kernels.table import Kernel, choose
from fewbit.layouts.dense import DENSE

Make = Callable[[QTensor, Kernel, Format | None], Any]
"""A constructor of prepared matrices."""


class Addressed:
    """Abstract: holds arrays, and their addresses as ``_matrix``, ``_matrices`` or ``_integers``, which is cached. A
    copy's arrays may lie elsewhere."""

    def __getstate__(self) -> dict[str, Any]:
        cached = ("_matrix", "_matrices", "_integers")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def __copy__(self) -> Any:
        """In the same memory."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__getstate__())
        return made


Array = np.ndarray[Any, np.dtype[Any]]
"""Pickled by its values. A tensor goes to another process as shared memory, into which its storage is moved: away from
the addresses that a core was given, and out of reach where the tensor ends before that process has begun."""
Parts = tuple[Make, Format, Shape, Array, Mapping[str, Array], str, Format | None]


def parts(make: Make, qtensor: QTensor, kernel: str, activation: Format | None) -> Parts:
    """Arguments of :func:`again`: what a file would hold, and nothing of the memory around it."""
    dense = qtensor.repack(DENSE)
    params = {name: values.numpy() for name, values in dense.params.items()}
    return make, dense.format, dense.shape, dense.packed.numpy(), params, kernel, activation


def again(
    make: Make,
    format: Format,
    shape: Shape,
    packed: Array,
    params: Mapping[str, Array],
    kernel: str,
    activation: Format | None,
) -> Any:
    """Prepared anew, by the same row.

    Raises:
        UnsupportedError: this machine has no such row; the reason is in the message.
    """
    stored = {name: torch.from_numpy(values) for name, values in params.items()}
    qtensor = QTensor(format, DENSE, shape, torch.from_numpy(packed), stored)
    return make(qtensor, choose(format, shape, kernel, activation).kernel, activation)
