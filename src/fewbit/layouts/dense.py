# SPDX-License-Identifier: Apache-2.0
"""Dense n-bit fields, 1 to 24 bits: no bit wasted but the padding of a row to whole bytes.

Code ``j`` of a row occupies bits ``[n j, n j + n)`` of that row's bit string; bit ``i`` of the string is bit ``i % 8``
of byte ``i // 8`` (little-endian, least significant bit first). A row takes ``ceil(columns * n / 8)`` bytes::

    n = 3:   byte 0          byte 1          byte 2
             c2c2c1c1c1c0c0c0 c5c4c4c4c3c3c3c2 c7c7c7c6c6c6c5c5

Eight codes are always n bytes, so rows are packed eight codes at a time with shifts as wide as a code in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import compiled
from fewbit.core.format import Format, Params, code_shape
from fewbit.core.layout import Layout, Shape
from fewbit.layouts.arrays import expect, take

MOST = 24
"""Bits of a code: with a shift of up to 7, all there is room for in an int32."""


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that ``columns`` codes of ``bits`` bits take."""
    return -(-columns * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n), uint8 up to 8 bits and int32 above -> uint8 (rows, ceil(n * bits / 8)). Codes must be below
    ``2^bits``."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    rows, columns = codes.shape
    if (native := _compiled(codes, bits)) is not None:
        codes, found = codes.contiguous(), codes.new_empty(rows, row_bytes(columns, bits), dtype=torch.uint8)
        native.pack_fields(codes.data_ptr(), rows, columns, bits, found.data_ptr())
        return found
    eights = torch.nn.functional.pad(codes, (0, -columns % 8)).reshape(rows, -1, 8)
    packed = torch.empty(rows, eights.shape[1], bits, dtype=torch.uint8, device=codes.device)
    for byte in range(bits):
        parts = [
            eights[..., code] << (start - 8 * byte) if start >= 8 * byte else eights[..., code] >> (8 * byte - start)
            for code, start in enumerate(range(0, 8 * bits, bits))
            if start < 8 * byte + 8 and start + bits > 8 * byte
        ]
        field = parts[0]
        for part in parts[1:]:
            field = field | part
        packed[..., byte] = field & 255
    return packed.reshape(rows, -1)[:, : row_bytes(columns, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_rows`: (rows, columns), uint8 up to 8 bits and int32 above."""
    expect("packed codes", packed, (packed.shape[0], row_bytes(columns, bits)))
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if (native := _compiled(packed, bits)) is not None:
        packed, found = packed.contiguous(), packed.new_empty(rows, columns)
        native.unpack_fields(packed.data_ptr(), rows, columns, bits, found.data_ptr())
        return found
    groups = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).reshape(rows, -1, bits)
    codes = torch.empty(rows, groups.shape[1], 8, dtype=torch.uint8 if bits < 8 else torch.int32, device=packed.device)
    for code, start in enumerate(range(0, 8 * bits, bits)):
        byte, shift = divmod(start, 8)
        field = groups[..., byte].to(codes.dtype) >> shift
        for more in range(byte + 1, -(-(start + bits) // 8)):
            field = field | groups[..., more].to(codes.dtype) << (8 * more - start)
        codes[..., code] = field & (2**bits - 1)
    return codes.reshape(rows, -1)[:, :columns].contiguous()


def _compiled(bytes: Tensor, bits: int) -> compiled.Grids | None:
    """What packs and unpacks ``bytes`` fastest, if it can."""
    fits = bits < 8 and bytes.dtype == torch.uint8 and bytes.device.type == "cpu" and bytes.numel() > 0
    return compiled.grids() if fits else None


def _apart(values: Tensor) -> Tensor:
    """A copy where ``values`` are a view whose bytes a file could not write: one entry that repeats, say."""
    return values.clone(memory_format=torch.contiguous_format) if values.numel() == 1 else values.contiguous()


def store_params(format: Format, params: Params) -> dict[str, Tensor]:
    """Logical (rows, blocks, 1) parameters as they lie in a file: one entry a block, span, chunk, block of columns,
    group of rows or tensor, n-bit packed. Entries of chunks are (1, chunks), of columns (blocks, *entry), of rows
    (groups, *entry)."""
    stored = {}
    for param in format.params:
        if param.per == "columns":
            stored[param.name] = params[param.name][0, :, 0].contiguous()
            continue
        if param.per == "rows" or param.entry:
            values = params[param.name]
            each = format.group_rows if param.per == "rows" else len(values)
            stored[param.name] = _apart(values[::each, 0, 0])
            continue
        values = params[param.name].squeeze(-1)
        if param.per == "tensor":
            values = values[:1, :1]
        elif param.per == "span":
            values = values[:, :: format.fit_block // format.block]
        elif param.per == "chunk":
            values = values.reshape(1, -1)[:, :: format.chunk]
        values = _apart(values)
        stored[param.name] = pack_rows(values, param.bits) if param.bits < 8 else values
    return stored


def load_params(format: Format, shape: Shape, stored: Params) -> dict[str, Tensor]:
    """Inverse of :func:`store_params`."""
    rows, blocks = code_shape(format, shape)[0], B.count(shape[1], format.block)
    params = {}
    for param in format.params:
        if param.per == "columns":
            values = take(stored, param.name, (blocks, *param.entry))
            params[param.name] = values[None, :, None].expand(rows, *[-1] * (2 + len(param.entry)))
            continue
        if param.per == "rows" or param.entry:
            each = format.group_rows if param.per == "rows" else rows
            values = take(stored, param.name, (-(-rows // each), *param.entry))
            values = values.repeat_interleave(each, 0)[:rows] if 1 < each < rows else values
            params[param.name] = values[:, None, None].expand(rows, blocks, 1, *param.entry)
            continue
        if param.per == "chunk":
            values = take(stored, param.name, (1, -(-rows * blocks // format.chunk)))
            many = values.repeat_interleave(format.chunk, 1)[:, : rows * blocks]
            params[param.name] = many.reshape(rows, blocks, 1)
            continue
        repeat = format.fit_block // format.block if param.per == "span" else 1
        height, entries = (1, 1) if param.per == "tensor" else (rows, -(-blocks // repeat))
        if param.bits < 8:
            packed = take(stored, param.name, (height, row_bytes(entries, param.bits)))
            values = unpack_rows(packed, param.bits, entries).unsqueeze(-1)
        else:
            values = take(stored, param.name, (height, entries)).unsqueeze(-1)
        params[param.name] = (
            values.expand(rows, blocks, 1) if param.per == "tensor" else B.per_block(values, blocks, repeat)
        )
    return params


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    return pack_rows(codes, format.bits), store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = code_shape(format, shape)
    expect("packed codes", packed, (rows, row_bytes(columns, format.bits)))
    return unpack_rows(packed, format.bits, columns), load_params(format, shape, stored)


def _refuse(format: Format, shape: Shape) -> str | None:
    return None if format.bits <= MOST else f"packs codes of at most {MOST} bits; {format.name} has {format.bits}"


DENSE = Layout("dense", _refuse, _pack, _unpack)
