# SPDX-License-Identifier: Apache-2.0
"""The layout of the native kernels of vectors of bytes: codes as a matrix of their own, in tiles of 16 and chunks of
32 columns.

A code stands for ``length`` rows of a column, so there are ceil(rows / length) codes a column. A chunk holds the
indices of its 16 x 32 codes into the codebook, as :mod:`fewbit.kernels.tile16` draws a chunk of ``index_bits``, then
those into the residual book, as one of ``residual_bits``. Chunks of a tile follow one another, then the next tile:
(tiles, chunks * bits of a code * 64) bytes, ragged edges padded with code 0; indices of
fewer than 4 bits take 4, as in :mod:`fewbit.kernels.column8`. Sixty-four indices into one book then come
out as bytes by shifts and masks, 16 codes of four neighbouring columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format, Params, code_shape
from fewbit.core.layout import Layout, Shape
from fewbit.errors import InputError
from fewbit.formats.vector import Vector
from fewbit.kernels import pages
from fewbit.kernels.column8 import fields, joined, split
from fewbit.kernels.tile16 import pack_codes, size, unpack_rows
from fewbit.layouts.dense import load_params, store_params

MOST_BITS = 8
"""Of an index: a byte."""


def checked(format: Format, shape: Shape, packed: Tensor) -> Tensor:
    """``packed``, contiguous.

    Raises:
        InputError: it is not the bytes of a (rows, columns) matrix: a kernel would read beyond them.
    """
    expected = size(code_shape(format, shape), sum(fields(format)))
    if tuple(packed.shape) != expected or packed.dtype != torch.uint8:
        raise InputError(
            f"vector16 codes of a {tuple(shape)} matrix of {format.name}",
            f"found {packed.dtype} {tuple(packed.shape)}",
            f"uint8 {expected} would work",
        )
    return packed.contiguous()


def _refuse(format: Format, shape: Shape) -> str | None:
    if not isinstance(format, Vector):
        return f"holds vectors down columns; {format.name} is something else"
    most = max(format.fields.values())
    return None if most <= MOST_BITS else f"holds indices of at most {MOST_BITS} bits; {format.name} has {most}"


def _pack(format: Format, shape: Shape, codes: Tensor, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    packed = pages.empty(size(code_shape(format, shape), sum(fields(format))))
    chunks, base = packed.reshape(len(packed), -1, sum(fields(format)) * 64), 0
    for index, bits in zip(split(format, codes), fields(format), strict=True):
        field = pack_codes(index.to(torch.uint8), bits)
        chunks[:, :, base * 64 : (base + bits) * 64] = field.reshape(len(packed), -1, bits * 64)
        base += bits
    return packed, store_params(format, params)


def _unpack(format: Format, shape: Shape, packed: Tensor, stored: Params) -> tuple[Tensor, dict[str, Tensor]]:
    rows, columns = code_shape(format, shape)
    packed = checked(format, shape, packed)
    chunks = packed.reshape(len(packed), -1, sum(fields(format)) * 64)
    indices, base = [], 0
    for bits in fields(format):
        field = chunks[:, :, base * 64 : (base + bits) * 64].reshape(len(packed), -1)
        indices.append(unpack_rows(field, (rows, columns), bits, torch.arange(rows)))
        base += bits
    return joined(format, indices), load_params(format, shape, stored)


VECTOR16 = Layout("vector16", _refuse, _pack, _unpack)
