# SPDX-License-Identifier: Apache-2.0
"""Tables of levels, up to 256: the code of a value, and the value of a code."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import compiled


def codes(values: Tensor, bounds: Tensor) -> Tensor:
    """Uint8, of the shape of ``values``: how many of the ascending ``bounds`` (levels - 1,) are below
    each of them; all, for NaN."""
    native = compiled.grids()
    values, bounds = values.contiguous(), bounds.to(values.device)
    if native is None or values.device.type != "cpu" or not values.dtype == bounds.dtype == torch.float32:
        return torch.bucketize(values, bounds, out_int32=True).to(torch.uint8)
    found = torch.empty_like(values, dtype=torch.uint8)
    bounds = bounds.contiguous()
    native.table_codes(
        values.data_ptr(), values.numel(), bounds.data_ptr(), len(bounds), found.data_ptr(), compiled.BEST
    )
    return found


def values(codes: Tensor, table: Tensor) -> Tensor:
    """``table[codes]``: torch gathers along a dimension several times as fast as it indexes."""
    return table.index_select(0, codes.int().flatten()).reshape(codes.shape)
