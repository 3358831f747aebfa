# SPDX-License-Identifier: Apache-2.0
"""Tables of levels, up to 256: the code of a value, and the value of a code."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import compiled


def codes(values: Tensor, bounds: Tensor) -> Tensor:
    """Uint8, of the shape of ``values``: how many of the ascending ``bounds`` (levels - 1,) are below
    each of them; all, for NaN. ``bounds`` (tables, levels - 1): of ``values`` (tables, ...), each by its own."""
    native = compiled.grids()
    values, bounds = values.contiguous(), bounds.to(values.device).contiguous()
    if native is None or values.device.type != "cpu" or not values.dtype == bounds.dtype == torch.float32:
        flat = values if bounds.dim() == 1 else values.reshape(len(bounds), -1)
        return torch.searchsorted(bounds, flat, out_int32=True).to(torch.uint8).reshape(values.shape)
    found = torch.empty_like(values, dtype=torch.uint8)
    tables = bounds.shape[0] if bounds.dim() > 1 else 1
    sizes = (tables, values.numel() // tables if tables else 0, bounds.shape[-1])
    native.table_codes(sizes, values.data_ptr(), bounds.data_ptr(), found.data_ptr(), compiled.BEST)
    return found


def values(codes: Tensor, table: Tensor) -> Tensor:
    """``table[codes]``: torch gathers along a dimension several times as fast as it indexes. ``table`` (tables,
    levels): of ``codes`` (tables, ...), each by its own."""
    if table.dim() == 1:
        return table.index_select(0, codes.int().flatten()).reshape(codes.shape)
    starts = torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=codes.device)
    at = codes + starts.reshape(-1, *[1] * (codes.dim() - 1))
    return table.flatten().index_select(0, at.flatten()).reshape(codes.shape)
