# SPDX-License-Identifier: Apache-2.0
"""Products through decoded weights: rows are decoded strip by strip, each once for all tokens, and torch multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.kernels import pages
from fewbit.kernels.prepared import PreparedMatrix

DECODED = 48
"""Tokens from which on float products go through decoded weights: each is decoded once, and torch multiplies. So do
those of 24 bits on several threads, where torch's own threads, which spin for a while, would be in the way of ours, and
on AVX2, where torch is faster."""
STRIP = 1 << 19
"""Weights decoded at a time: 2 MiB of float32."""


def rows_of_strip(columns: int, tile: int) -> int:
    """Rows that are decoded at a time: whole tiles of ``tile`` rows, one at least."""
    return max(tile, STRIP // columns // tile * tile)


def multiply_decoded(matrix: PreparedMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` for x (..., columns), float32 (tokens, rows): strips of rows are decoded to float32, each once
    for all tokens, and torch multiplies."""
    x = x.float().contiguous().reshape(-1, matrix.shape[1])  # torch's sums depend on strides
    y = pages.fresh(x.shape[0], matrix.shape[0])
    for rows, weight in matrix.decoded():
        torch.mm(x, weight.T, out=y[:, rows])
    return y if bias is None else y.add_(bias.float())
