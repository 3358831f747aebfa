# SPDX-License-Identifier: Apache-2.0
"""Dense n-bit fields, 1 to 8 bits: no bit wasted but the padding of a row to whole bytes.

Code ``j`` of a row occupies bits ``[n j, n j + n)`` of that row's bit string; bit ``i`` of the string is bit ``i % 8``
of byte ``i // 8`` (little-endian, least significant bit first). A row takes ``ceil(columns * n / 8)`` bytes::

    n = 3:   byte 0          byte 1          byte 2
             c2c2c1c1c1c0c0c0 c5c4c4c4c3c3c3c2 c7c7c7c6c6c6c5c5
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format, Params
from fewbit.core.layout import Layout, Shape


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, n) -> uint8 (rows, ceil(n * bits / 8))."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).reshape(codes.shape[0], -1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).reshape(codes.shape[0], -1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_rows`: uint8 (rows, columns)."""
    if bits == 8:
        return packed[:, :columns]
    stream = ((packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(packed.shape[0], -1)
    stream = stream[:, : columns * bits].reshape(packed.shape[0], columns, bits)
    return (stream << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def store_params(format: Format, params: Params) -> dict[str, Tensor]:
    """Logical (rows, blocks, 1) parameters as they lie in a file: one entry a block, span or tensor, n-bit packed."""
    stored = {}
    for param in format.params:
        values = params[param.name].squeeze(-1)
        if param.per == "tensor":
            values = values[:1, :1]
        elif param.per == "span":
            values = values[:, :: max(1, format.fit_block // max(format.block, 1))]
        values = values.contiguous()
        stored[param.name] = pack_rows(values, param.bits) if param.bits < 8 else values
    return stored


def load_params(format: Format, shape: Shape, stored: Params) -> dict[str, Tensor]:
    """Inverse of :func:`store_params`."""
    rows, columns = shape
    blocks = B.count(columns, format.block)
    params = {}
    for param in format.params:
        values = stored[param.name]
        repeat = max(1, format.fit_block // max(format.block, 1)) if param.per == "span" else 1
        entries = 1 if param.per == "tensor" else -(-blocks // repeat)
        if param.bits < 8:
            values = unpack_rows(values, param.bits, entries)
        values = values.unsqueeze(-1)
        params[param.name] = (
            values.expand(rows, blocks, 1) if param.per == "tensor" else B.per_block(values, blocks, repeat)
        )
    return params


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return pack_rows(codes, format.bits), store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    codes = unpack_rows(packed, format.bits, shape[1] // format.dim)
    return codes, load_params(format, shape, stored)


DENSE = Layout(
    "dense",
    refuse=lambda format, shape: None if format.bits <= 8 else f"packs codes of at most 8 bits; {format.name} has {format.bits}",
    pack=_pack,
    unpack=_unpack,
)
