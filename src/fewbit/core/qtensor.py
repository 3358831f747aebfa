# SPDX-License-Identifier: Apache-2.0
"""QTensor: one quantized matrix, as plain data."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import given, passes
from fewbit.core.format import Format, code_dtype, code_shape, decode, encode, fit, stackable
from fewbit.core.layout import UNPACKED, Layout
from fewbit.errors import UnsupportedError

_TRIAL = 16


@dataclass(frozen=True, eq=False)
class QTensor:
    """A (rows, columns) matrix in few bits.

    ``packed`` and ``params`` are the very arrays that a file holds, so their bytes are the true size. ``lost``: what
    :meth:`squares` says of the weight that was rounded to this, where one pass found both. ``note``: what the method
    that chose the codes has to say, such as that it could not do as it was asked.
    """

    format: Format
    layout: Layout
    shape: tuple[int, int]
    packed: Tensor
    params: Mapping[str, Tensor]
    lost: passes.Squares | None = None
    note: str = ""

    @staticmethod
    def of(
        format: Format,
        codes: Tensor,
        params: Mapping[str, Tensor],
        rows: int | None = None,
        lost: passes.Squares | None = None,
    ) -> QTensor:
        """From logical codes (rows / height, columns / dim) and parameters (rows / height, blocks, 1), unpacked.
        ``rows`` of the matrix need saying only where they are not whole codes."""
        shape = (codes.shape[0] * format.height if rows is None else rows, codes.shape[1] * format.dim)
        return QTensor(format, UNPACKED, shape, codes, dict(params), lost)

    @staticmethod
    def nearest(format: Format, weight: Tensor, params: Mapping[str, Tensor]) -> QTensor:
        """``weight`` (rows, columns) by the nearest codes under ``params`` (rows / height, blocks, 1), unpacked."""
        found = passes.round_even(format, weight.float(), params)
        codes, _, lost = found or (encode(format, weight, params), params, None)
        return QTensor.of(format, codes, params, weight.shape[0], lost)

    @staticmethod
    def rounded(format: Format, weight: Tensor) -> QTensor:
        """``weight`` (rows, columns) by the nearest codes under parameters that a bound ``format`` fits, unpacked."""
        found = passes.round_even(format, weight.float())
        if found is None:
            return QTensor.nearest(format, weight, fit(format, weight))
        codes, params, lost = found
        return QTensor.of(format, codes, params, weight.shape[0], lost)

    def logical(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (rows / height, columns / dim) and parameters (rows / height, blocks, 1)."""
        return self.layout.unpack(self.format, self.shape, self.packed, self.params)

    def dequantize(self) -> Tensor:
        """The float32 (rows, columns) matrix that this stands for."""
        return decode(self.format, *self.logical())[: self.shape[0]]

    def squares(self, weight: Tensor) -> passes.Squares:
        """Of this and ``weight`` (rows, columns)."""
        weight = weight.float()
        found = passes.squares(self.format, *self.logical(), weight)
        return found or (sum_of_squares(self.dequantize() - weight), sum_of_squares(weight))

    def repack(self, layout: Layout) -> QTensor:
        """The same codes and parameters in a layout; nothing is fitted again.

        Raises:
            UnsupportedError: the layout refuses this format or shape; the reason is in the message.
        """
        given.kind("a layout", layout, Layout, "what fewbit.layouts.named('dense') gives")
        if layout is self.layout:
            return self
        reason = layout.refuse(self.format, self.shape)
        if reason is not None:
            raise UnsupportedError(f"{self.format.name} of shape {self.shape} in layout {layout.name}", reason)
        packed, stored = layout.pack(self.format, self.shape, *self.logical())
        return QTensor(self.format, layout, self.shape, packed, stored, self.lost, self.note)

    @property
    def nbytes(self) -> int:
        """Bytes stored: codes, scales, zero points, tables; everything."""
        return sum(t.nbytes for t in (self.packed, *self.params.values()))

    @property
    def bits_per_weight(self) -> float:
        """True stored bits per weight."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def sum_of_squares(values: Tensor) -> float:
    """Of ``values`` (rows, columns): of a row in float32, of rows in float64."""
    return float(torch.linalg.vector_norm(values, dim=1).square().sum(dtype=torch.float64))


def stack(parts: Sequence[QTensor]) -> QTensor:
    """Matrices of one format and width as one, by rows, unpacked.

    Raises:
        UnsupportedError: several matrices, with parameters that all rows of a matrix share, or groups of rows that do
            not end where the matrix ends.
    """
    if len(parts) == 1:
        return parts[0]
    if not all(stackable(part.format, part.shape[0]) for part in parts):
        raise UnsupportedError(
            f"{len(parts)} matrices in {parts[0].format.name} as one", "each has parameters that all its rows share"
        )
    logical = [part.logical() for part in parts]
    params = {name: torch.cat([values[name] for _, values in logical]) for name in logical[0][1]}
    return QTensor.of(parts[0].format, torch.cat([codes for codes, _ in logical]), params)


def unstack(whole: QTensor, rows: Sequence[int]) -> list[QTensor]:
    """The matrices of so many ``rows`` that :func:`stack` made ``whole`` of, unpacked; of a format of height 1."""
    codes, params = whole.logical()
    split = {name: values.split(list(rows)) for name, values in params.items()}
    parts = enumerate(codes.split(list(rows)))
    return [QTensor.of(whole.format, one, {name: each[i] for name, each in split.items()}) for i, one in parts]


def storage(format: Format, layout: Layout, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every array that a (rows, columns) matrix will take, without making it.

    Packs matrices of 16 and 32 rows of codes and extrapolates: every layout is linear in these, and keeps entries of
    groups of rows, and of chunks, one after the other. The code array is called ``packed``. Raises UnsupportedError
    when the layout refuses.
    """
    return dict(_storage(format, layout, shape))


@functools.lru_cache(maxsize=1024)
def _storage(format: Format, layout: Layout, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """A model has hundreds of layers of few shapes, each asked for several times."""
    one, two = _trials(format, layout, shape[1])
    rows = code_shape(format, shape)[0]
    if layout is UNPACKED:
        return {name: (dtype, (rows, *size[1:])) for name, (dtype, size) in one.items()}
    groups = {p.name: (-(-rows // format.group_rows), *p.entry) for p in format.params if p.per == "rows"}
    blocks = rows * B.count(shape[1], format.block)
    groups |= {p.name: (1, -(-blocks // format.chunk)) for p in format.params if p.per == "chunk"}
    sizes = {
        name: (
            dtype,
            tuple(a + (b - a) * (rows - _TRIAL) // _TRIAL for a, b in zip(size, two[name][1], strict=True)),
        )
        for name, (dtype, size) in one.items()
    }
    return {name: (dtype, groups.get(name, size)) for name, (dtype, size) in sizes.items()}


@functools.lru_cache(maxsize=256)
def _trials(format: Format, layout: Layout, columns: int) -> list[dict[str, tuple[torch.dtype, torch.Size]]]:
    """What 16 and 32 rows of codes take."""
    trials = []
    for number in (_TRIAL, 2 * _TRIAL):
        zeros = torch.zeros(number * format.height, columns, dtype=torch.float32)
        bound = format.bind(zeros)
        codes = torch.zeros(code_shape(bound, (number * format.height, columns)), dtype=code_dtype(bound))
        packed = QTensor.of(bound, codes, fit(bound, zeros)).repack(layout)
        trials.append({name: (t.dtype, t.shape) for name, t in {"packed": packed.packed, **packed.params}.items()})
    return trials


def storage_bytes(sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes of what :func:`storage` describes."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in sizes.values())
