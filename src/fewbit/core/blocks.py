# SPDX-License-Identifier: Apache-2.0
"""Rows cut into blocks that share parameters, and back.

A weight is ``(rows, columns)``; its blocks are ``(rows, blocks, block)``. ``block == 0`` means the whole row
(per channel). When ``block`` does not divide ``columns`` the last block is shorter: it is padded with zeros here
and the padding is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def width(columns: int, block: int) -> int:
    """Columns that share parameters in a row of ``columns``; ``block == 0`` is the whole row."""
    return columns if block == 0 else block


def count(columns: int, block: int) -> int:
    """Number of blocks in a row, the last one possibly shorter."""
    return -(-columns // width(columns, block))


def split(matrix: Tensor, block: int) -> Tensor:
    """``(rows, columns) -> (rows, blocks, block)``, zero-padded at the end of each row."""
    rows, columns = matrix.shape
    size, number = width(columns, block), count(columns, block)
    if size * number != columns:
        matrix = torch.nn.functional.pad(matrix, (0, size * number - columns))
    return matrix.reshape(rows, number, size)


def join(blocks: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`split`: ``(rows, blocks, block) -> (rows, columns)``."""
    return blocks.flatten(1)[:, :columns]


def fold(blocks: Tensor, height: int) -> Tensor:
    """``(rows, blocks, block) -> (ceil(rows / height), blocks, block * height)``: ``height`` neighbours of a column
    become neighbours of a row; rows are padded with zeros at the end."""
    if height == 1:
        return blocks
    rows, number, size = blocks.shape
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, 0, 0, -rows % height))
    return padded.reshape(-1, height, number, size).permute(0, 2, 3, 1).reshape(-1, number, size * height)


def unfold(blocks: Tensor, height: int) -> Tensor:
    """Inverse of :func:`fold`, padding rows included."""
    if height == 1:
        return blocks
    rows, number, size = blocks.shape
    folded = blocks.reshape(rows, number, size // height, height)
    return folded.permute(0, 3, 1, 2).reshape(rows * height, number, size // height)


def present(columns: int, block: int, device: torch.device | None = None) -> Tensor:
    """``(1, blocks, block)`` float32: 1 where a column exists, 0 on padding."""
    return split(torch.ones(1, columns, dtype=torch.float32, device=device), block)


def per_block(values: Tensor, blocks: int, repeat: int) -> Tensor:
    """Entries of spans, repeated for their blocks: ``(rows, spans, 1) -> (rows, blocks, 1)``, each ``repeat`` times."""
    return values.repeat_interleave(repeat, dim=1)[:, :blocks]
