# SPDX-License-Identifier: Apache-2.0
"""What passes over a whole weight is compiled: rounding it to an even grid, and the squares of what that loses.

The plain ways, which these equal, are :mod:`fewbit.core.format`'s: ``fit``, ``encode`` and ``decode``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import compiled
from fewbit.core.format import Format, Params, Physical


def round_even(format: Format, weight: Tensor, params: Params | None = None) -> tuple[Tensor, Params] | None:
    """Codes (rows, columns) nearest to float32 ``weight``, and the parameters (rows, blocks, 1) under which they are:
    ``params``, or those that are fitted to it. None where the format is not even, or without the compiled module."""
    native = compiled.grids()
    if native is None or not format.even or weight.device.type != "cpu" or not weight.numel():
        return None
    weight = weight.contiguous()
    rows, columns = weight.shape
    if params is None:
        scale, zero = torch.empty(2, rows, B.count(columns, format.block), 1).unbind()
    else:
        scale, zero = (each.contiguous() for each in format.even_grids(params))
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    width, ends, given = B.width(columns, format.block), format.grid == "ends", params is not None
    found = weight.data_ptr(), scale.data_ptr(), zero.data_ptr(), codes.data_ptr()
    native.grid_round((rows, columns, width, format.levels, int(ends), int(given)), *found, compiled.BEST)
    return codes, format.of_even_grids(scale, zero) if params is None else params


def squares(format: Format, codes: Tensor, params: Params, weight: Tensor) -> tuple[float, float] | None:
    """Sums of the squares of what ``codes`` stand for less float32 ``weight`` (rows, columns), and of the weight: of a
    row in float32, of rows in float64. None where codes are no bytes of one weight each, a row has a table of its own,
    or without the compiled module."""
    native = compiled.grids()
    if native is None or weight.device.type != "cpu" or codes.dtype != torch.uint8 or format.dim * format.height > 1:
        return None
    grid = format.physical(params)
    if not isinstance(grid, Physical) or (grid.table is not None and grid.table.dim() > 1):
        return None
    rows, columns = weight.shape
    parts = (weight, codes, grid.scale, grid.offset, grid.table)
    arrays = [part if part is None else part.contiguous() for part in parts]  # kept until the call ends
    seen, stored, scale, offset, table = (0 if array is None else array.data_ptr() for array in arrays)
    sizes = (rows, columns, B.width(columns, format.block))
    return native.squares(sizes, seen, stored, scale, offset, table, compiled.BEST)
