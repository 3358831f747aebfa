# SPDX-License-Identifier: Apache-2.0
"""What passes over a whole weight is compiled: rounding it to an even grid, and the squares of what any codes lose.

The plain ways, which these equal, are :mod:`fewbit.core.format`'s: ``fit``, ``encode`` and ``decode``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import compiled
from fewbit.core.format import Format, Params, Physical

Squares = tuple[float, float]
"""Sums of the squares of what stands for a weight less that weight, and of the weight: of a row in float32, of rows in
float64."""


def round_even(format: Format, weight: Tensor, params: Params | None = None) -> tuple[Tensor, Params, Squares] | None:
    """Codes (rows, columns) nearest to float32 ``weight``, the parameters (rows, blocks, 1) under which they are,
    ``params`` or those that are fitted to it, and :func:`squares` of them. None where the format is not even, or
    without the compiled module."""
    native = compiled.grids()
    if native is None or not format.even or weight.device.type != "cpu" or not weight.numel():
        return None
    weight = weight.contiguous()
    rows, columns = weight.shape
    codes = weight.new_empty(rows, columns, dtype=torch.uint8)
    if params is None:
        shape = rows, B.count(columns, format.block), 1
        grids = {param.name: weight.new_empty(shape, dtype=param.dtype) for param in format.params}
    else:
        grids = {param.name: params[param.name].contiguous() for param in format.params}
    scale, zero = (*(grid.data_ptr() for grid in grids.values()), 0)[:2]
    sizes = (rows, columns, B.width(columns, format.block), format.levels, int(params is not None))
    lost = native.grid_round(sizes, weight.data_ptr(), scale, zero, codes.data_ptr(), compiled.BEST)
    return codes, grids if params is None else params, lost


def squares(format: Format, codes: Tensor, params: Params, weight: Tensor) -> Squares | None:
    """Of what ``codes`` stand for and float32 ``weight`` (rows, columns). None where codes are no bytes of one weight
    each, a row has a table of its own, or without the compiled module."""
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
