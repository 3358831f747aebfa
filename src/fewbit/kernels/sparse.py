# SPDX-License-Identifier: Apache-2.0
"""The kernel family "sparse": few entries, added onto the float32 result of whatever came before.

The native rows hold entries in slices of 8 rows (``slice8``, drawn in ``csrc/include/fewbit.h``): the rows of each 256
are sorted by length, so that hardly anything is padded, and 8 sums run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewbit.core.terms import Sparse
from fewbit.kernels import native
from fewbit.kernels.copies import Addressed, Array
from fewbit.kernels.inputs import given
from fewbit.kernels.native import Isa
from fewbit.kernels.table import Kernel

SLICE, WINDOW = 8, 256
NARROW = (1 << 16) - 1
"""Columns up to which an index of 16 bits has a value to spare, for entries that pad."""


@dataclass(frozen=True)
class SparseKernel:
    """One row: ``y += x W^T`` for few entries, on one instruction set, named as its file in ``csrc/``. None is torch's
    own sparse product, which runs anywhere."""

    isa: Isa | None

    @property
    def name(self) -> str:
        return f"sparse_add_{self.isa}" if self.isa else "reference"

    def refuse(self) -> str | None:
        """None, or the reason why this row cannot run on this machine."""
        return None if self.isa is None else native.lacks(self.isa)


SPARSE_KERNELS = (SparseKernel("avx2"), SparseKernel("neon"), SparseKernel("serial"), SparseKernel(None))
"""Best first. AVX-512 brought nothing over AVX2: activations are loaded one by one, or eight tokens at a time."""


def choose_sparse(beside: Kernel | None = None) -> SparseKernel:
    """The best row here, or the one on the instruction set of a row of the kernel table."""
    if beside is None:
        return next(row for row in SPARSE_KERNELS if row.refuse() is None)
    isa: str | None = beside.isa
    if isa is not None:
        isa = next((least for least in ("avx2", "neon") if isa.startswith(least[:3])), isa)
    return next(row for row in SPARSE_KERNELS if row.isa == isa)


def _slices(sparse: Sparse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(start (slices + 1,) int64, order (slices, 8) uint8, index (steps, 8), value (steps, 8)) of slice8."""
    rows, columns = sparse.shape
    slices = -(-rows // SLICE)
    lengths = torch.nn.functional.pad(sparse.pointers.long().diff(), (0, SLICE * slices - rows), value=-1)
    window = torch.arange(lengths.numel()) // WINDOW
    place = torch.argsort(window * (columns + 2) - lengths, stable=True)  # the row of each lane; no row comes last
    steps = lengths[place].reshape(-1, SLICE)[:, 0]
    start = torch.nn.functional.pad(steps.cumsum(0), (1, 0))
    lane = torch.empty_like(place)
    lane[place] = torch.arange(place.numel())
    row = sparse.rows()
    turn = torch.arange(row.numel()) - sparse.pointers.long()[row]  # which entry of its row each is
    at = (start[lane[row] // SLICE] + turn) * SLICE + lane[row] % SLICE
    index = torch.full((int(start[-1]) * SLICE,), columns)
    index[at] = sparse.columns.long()
    value = torch.zeros(index.numel(), dtype=sparse.values.dtype)
    value[at] = sparse.values
    narrow = torch.uint16 if columns <= NARROW else torch.int32
    return start, (place % WINDOW).to(torch.uint8), index.to(narrow), value


class PreparedSparse(Addressed):
    """Entries ready to be added, by one row of :data:`SPARSE_KERNELS`."""

    def __init__(self, sparse: Sparse, kernel: SparseKernel) -> None:
        self.sparse, self.kernel = sparse, kernel.name
        self._isa = native.FLAGS[kernel.isa] if kernel.isa else 0
        self._slices = _slices(sparse) if kernel.isa else None

    def __reduce__(self) -> tuple[Any, ...]:
        sparse = self.sparse
        arrays = (array.numpy() for array in (sparse.pointers, sparse.columns, sparse.values))
        return _again, (sparse.shape, *arrays, self.kernel)

    @cached_property
    def _matrix(self) -> native.SparseMatrix:
        assert self._slices is not None
        start, order, index, value = self._slices
        return (
            *self.sparse.shape,
            index.element_size(),
            int(value.dtype == torch.float16),
            start.data_ptr(),
            order.data_ptr(),
            index.data_ptr(),
            value.data_ptr(),
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """``y += x W^T`` in place: x (tokens, columns) in float32, bfloat16 or float16 with any strides, y (tokens,
        rows) float32 with rows next to one another. Sums are float32, added to y once."""
        if self._slices is None:
            y += (self._torch(False) @ x.float().T).T
            return
        x, address = given(x)
        native.core().sparse_add(self._matrix, address, y.data_ptr(), y.stride(0), self._isa, torch.get_num_threads())

    def backward(self, gradient: Tensor) -> Tensor:
        """``gradient W``: float32 (tokens, rows) -> (tokens, columns)."""
        return (self._torch(True) @ gradient.T).T

    def _torch(self, transposed: bool) -> Tensor:
        """The matrix, or its transpose, as torch's own kind of sparse tensor."""
        at, shape = (self.sparse.rows(), self.sparse.columns.long()), self.sparse.shape
        if transposed:
            at, shape = at[::-1], shape[::-1]
        return torch.sparse_coo_tensor(torch.stack(at), self.sparse.values.float(), shape, check_invariants=False)

    @property
    def read_bytes(self) -> int:
        """Bytes that one call with one token reads."""
        arrays = self._slices or (self.sparse.pointers, self.sparse.columns, self.sparse.values)
        return sum(array.nbytes for array in arrays)

    @property
    def nbytes(self) -> int:
        """Bytes held: entries both as stored and as the kernel reads them."""
        return self.sparse.nbytes + (self.read_bytes if self._slices else 0)


def _again(shape: tuple[int, int], pointers: Array, columns: Array, values: Array, kernel: str) -> PreparedSparse:
    """Prepared anew, by the same row."""
    sparse = Sparse(shape, *(torch.from_numpy(array) for array in (pointers, columns, values)))
    return PreparedSparse(sparse, next(row for row in SPARSE_KERNELS if row.name == kernel))
