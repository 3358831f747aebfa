# SPDX-License-Identifier: Apache-2.0
"""Engines for even grids and tables, compiled: the range search and, for even grids, the sweep of
:mod:`fewbit.methods.ranges` and :mod:`fewbit.methods.feedback`, which say what is computed and run every other format.

A format is ``even`` where its values are ``scale * (code - zero)``, and has ``bounds`` where they are ``scale *
table[code]``; see :class:`fewbit.core.format.Format`. Searches give the same bits as those in torch. The sweep rounds
products and sums one by one where torch may fuse them, so that values may differ in the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import compiled
from fewbit.core.format import Format, Params, Physical
from fewbit.core.qtensor import QTensor
from fewbit.methods.feedback import Feedback


def search(format: Format, weight: Tensor, worth: Tensor, ratios: tuple[float, ...]) -> dict[str, Tensor] | None:
    """Parameters of the even ``format`` for float32 ``weight`` (rows, columns) under ``worth`` (columns,); None without
    the compiled module."""
    native = compiled.grids()
    if native is None or not format.even or weight.device.type != "cpu":
        return None
    weight, worth, tried = weight.contiguous(), worth.float().contiguous(), weight.new_tensor(ratios)
    rows, columns = weight.shape
    scale, zero = weight.new_empty(2, rows, B.count(columns, format.block), 1).unbind()
    sizes = (rows, columns, B.width(columns, format.block), len(ratios), format.levels, int(format.grid == "ends"))
    found = scale.data_ptr(), zero.data_ptr()
    native.grid_search(sizes, weight.data_ptr(), worth.data_ptr(), tried.data_ptr(), *found, compiled.BEST)
    return format.of_even_grids(scale, zero)


def search_table(format: Format, blocks: Tensor, worth: Tensor, ratios: tuple[float, ...]) -> dict[str, Tensor] | None:
    """Parameters of a ``format`` with ``bounds`` for float32 ``blocks`` (rows, blocks, block) under ``worth``
    (1, blocks, block); None for other formats, or without the compiled module."""
    native = compiled.grids()
    if native is None or format.bounds is None or blocks.device.type != "cpu":
        return None
    blocks, worth = blocks.contiguous(), worth.contiguous()
    rows, number, size = blocks.shape
    tried = blocks.new_tensor((1.0, *ratios)).reshape(-1, 1, 1, 1)
    peaks = (blocks.abs().amax(-1, keepdim=True) * tried).reshape(-1, number, 1)
    params = format.fit(peaks, torch.ones_like(peaks))
    grid = format.physical(params)
    assert isinstance(grid, Physical) and grid.table is not None  # bounds
    scales, chosen = grid.scale.contiguous(), blocks.new_empty(1, rows, number, 1, dtype=torch.int64)
    native.table_search(
        (rows, number, size, len(tried), format.levels),
        blocks.data_ptr(),
        worth.data_ptr(),
        scales.data_ptr(),
        grid.table.data_ptr(),
        format.bounds.data_ptr(),
        chosen.data_ptr(),
        compiled.BEST,
    )
    return {name: each.reshape(-1, rows, number, 1).gather(0, chosen)[0] for name, each in params.items()}


class Columns:
    """Codes of an even format in the making, some columns at a time; ``params`` stand still."""

    def __init__(
        self, native: compiled.Grids, format: Format, shape: torch.Size, params: Params, order: Tensor
    ) -> None:
        self._native, self._format, self._params, self._order = native, format, params, order.contiguous()
        rows, columns = shape
        self._width = B.width(columns, format.block)
        self._codes = torch.empty(columns, rows, dtype=torch.uint8)
        self._scale, self._zero = (each.squeeze(-1).T.contiguous() for each in format.even_grids(params))

    @staticmethod
    def of(format: Format, shape: torch.Size, params: Params, feedback: Feedback) -> Columns | None:
        """None where the format is not even, or without the compiled module."""
        native = compiled.grids()
        return None if native is None or not format.even else Columns(native, format, shape, params, feedback.order)

    def round(self, first: int, current: Tensor, before: Tensor, upper: Tensor, lost: Tensor) -> None:
        """See :data:`fewbit.methods.feedback.Within`."""
        columns = upper.T if upper.stride(0) == 1 else upper.T.contiguous()
        for begin in range(0, len(current), compiled.SWEPT):
            here = slice(begin, begin + compiled.SWEPT)
            if begin:
                current[here].addmm_(upper[:begin, here].T, lost[:begin])
            sizes = (current.shape[1], len(current[here]), self._width, self._format.levels)
            inside = columns[here, here]
            self._native.grid_sweep(
                sizes,
                current[here].data_ptr(),
                before[here].data_ptr(),
                (inside.data_ptr(), columns.stride(0)),
                lost[here].data_ptr(),
                self._order[first + begin :].data_ptr(),
                self._scale.data_ptr(),
                self._zero.data_ptr(),
                self._codes.data_ptr(),
                compiled.BEST,
            )

    def qtensor(self) -> QTensor:
        return QTensor.of(self._format, self._codes.T.contiguous(), self._params)
