# SPDX-License-Identifier: Apache-2.0
"""The operations on quantized matrices: multiply, look rows up. Each is a choice of kernel and a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from fewbit.core import format as F
from fewbit.core import given
from fewbit.core.defaults import on_cpu
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Terms
from fewbit.errors import InputError
from fewbit.formats.fixed import Fixed
from fewbit.formats.outliers import Outliers
from fewbit.kernels import native
from fewbit.kernels.arranged import BYTES16, HALVES16, unpack_rows_of_arranged
from fewbit.kernels.byte_vectors import ByteVectorPrepared
from fewbit.kernels.inputs import check_memory, exact
from fewbit.kernels.outliers import OutlierPrepared
from fewbit.kernels.prepared import Prepared, PreparedMatrix
from fewbit.kernels.row_tables import RowLevelsPrepared, RowTablesPrepared
from fewbit.kernels.slow import ReferencePrepared
from fewbit.kernels.sparse import choose_sparse
from fewbit.kernels.table import choose, named, no_row
from fewbit.kernels.terms import PreparedTerms
from fewbit.kernels.tile16 import TILE16, unpack_rows
from fewbit.kernels.tiled import NativePrepared
from fewbit.kernels.vectors import VectorPrepared
from fewbit.layouts.dense import DENSE, load_params


@overload
def prepare(weight: QTensor, kernel: str | None = None, activation: Format | None = None) -> PreparedMatrix: ...


@overload
def prepare(weight: Terms, kernel: str | None = None, activation: Format | None = None) -> PreparedTerms: ...


@exact
def prepare(weight: QTensor | Terms, kernel: str | None = None, activation: Format | None = None) -> Prepared:
    """Repack ``weight`` for the best kernels here, or for the one named. Offline work: do it once a weight.

    Args:
        weight: one matrix in any layout, or a sum of terms.
        kernel: a name of the kernel table. It runs every matrix of a sum, whose sparse entries run on its instruction
            set.
        activation: the format that inputs are rounded to, token by token, as they arrive; None leaves them alone.
            What that means for a sum is said at :class:`fewbit.kernels.PreparedTerms`.

    Raises:
        SpecError, UnsupportedError: as :func:`fewbit.kernels.choose`; or no calibration has fixed the grid of
            ``activation``; or ``weight`` or ``activation`` is of another kind.
    """
    given.kind("a quantized weight", weight, (QTensor, Terms), "what a method makes, as fewbit.methods.rtn does")
    given.optional("activation", activation, Format, "a format, as fewbit.formats.parse('int8/channel') gives")
    with on_cpu():
        if isinstance(weight, QTensor):
            return _prepare_matrix(weight, kernel, activation)
        beside = None if kernel is None else named(kernel)
        return PreparedTerms(
            weight, lambda matrix: _prepare_matrix(matrix, kernel, activation), choose_sparse(beside), activation
        )


def _prepare_matrix(qtensor: QTensor, kernel: str | None, activation: Format | None) -> PreparedMatrix:
    if isinstance(activation, Outliers):
        small = _prepare_matrix(qtensor, kernel, activation.inner)
        return OutlierPrepared(small, _prepare_matrix(small.qtensor(), _of_floats(kernel), None), activation)
    if isinstance(activation, Fixed):
        activation.check()
    choice = choose(qtensor.format, qtensor.shape, kernel, activation)
    if choice.isa is not None:
        others: dict[str, Callable[..., PreparedMatrix]] = {
            "vector": VectorPrepared,
            "int8_vector": ByteVectorPrepared,
            "row_lut": RowTablesPrepared,
            "int8_row_lut": RowLevelsPrepared,
        }
        made = others.get(str(choice.kernel.family), NativePrepared)
        return made(qtensor, choice.kernel, activation)
    if kernel is None:
        reason = native.why_not() or no_row(choice, qtensor.format)
        warnings.warn(f"fewbit runs on its slow reference: {reason}", RuntimeWarning, stacklevel=4)
    return ReferencePrepared(qtensor, choice.kernel, activation)


def _of_floats(kernel: str | None) -> str | None:
    """Of float activations beside rounded ones: the row named, or the best one where it multiplies integers."""
    return None if kernel is not None and named(kernel).integers else kernel


def linear(
    x: Tensor,
    weight: QTensor | Terms,
    bias: Tensor | None = None,
    kernel: str | None = None,
    activation: Format | None = None,
) -> Tensor:
    """``x W^T + bias``: x (..., columns) -> (..., rows) in x's dtype, x rounded to ``activation`` first. Repacks at
    every call: for one weight and many calls, :func:`prepare` it."""
    return prepare(weight, kernel, activation)(x, bias)


@exact
def embedding(ids: Tensor, qtensor: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows ``ids`` (any shape, integers) of the matrix: (*ids.shape, columns) in ``dtype``.

    Layouts that keep rows apart (dense, unpacked, tile16 however arranged) decode only the rows asked for; any other is
    unpacked whole.

    Raises:
        IndexError: an id is not a row.
        InputError: ids are no integers. SpecError: an argument is of another kind.
        UnsupportedError: they stand for other tensors, whose computation is being recorded.
    """
    given.kind("ids", ids, Tensor, "a tensor of integers")
    given.kind("a quantized matrix", qtensor, QTensor, "what a method makes, as fewbit.methods.rtn does")
    given.kind("dtype", dtype, torch.dtype, "for example torch.float32")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InputError(f"rows of ids in {ids.dtype}", "they are no integers", "int32 and int64 would work")
    check_memory(ids)
    rows = ids.reshape(-1).long()
    if not rows.numel():
        return torch.empty(*ids.shape, qtensor.shape[1], dtype=dtype)
    if int(rows.min()) < 0 or int(rows.max()) >= qtensor.shape[0]:
        raise IndexError(f"ids go from {int(rows.min())} to {int(rows.max())}; the matrix has {qtensor.shape[0]} rows")
    format, shape = qtensor.format, qtensor.shape
    units, within = rows // format.height, rows % format.height
    if qtensor.layout in (TILE16, HALVES16, BYTES16):
        unpack = unpack_rows if qtensor.layout == TILE16 else unpack_rows_of_arranged
        codes = unpack(qtensor.packed, shape, format.bits, units)
        params = F.params_of_rows(format, load_params(format, shape, qtensor.params), units)
    elif qtensor.layout is DENSE and not any(param.per in ("rows", "chunk") for param in format.params):
        stored = dict(qtensor.params)
        for param in format.params:
            if not param.shared:
                stored[param.name] = stored[param.name][units]
        few = QTensor(format, DENSE, (units.numel() * format.height, shape[1]), qtensor.packed[units], stored)
        codes, params = few.logical()
    else:
        codes, params = qtensor.logical()
        codes, params = codes[units], F.params_of_rows(format, params, units)
    decoded = F.decode(format, codes, params).reshape(-1, format.height, shape[1])
    return decoded[torch.arange(len(rows), device=rows.device), within].to(dtype).reshape(*ids.shape, shape[1])
