# SPDX-License-Identifier: Apache-2.0
"""Matrices of signs: what the methods of about one bit a weight share.

Formats in question have two values a block, ``-a`` and ``a``: their parameters are made by fitting blocks whose
entries are all ``a``, so that no method need know how a format stores its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor


def refuse(format: Format) -> str | None:
    """None, or why a block of ``format`` is not signs under one scale."""
    two = format.levels == 2 and format.dim == format.height == 1
    if not two or [(param.name, param.per) for param in format.params] != [("scale", "block")]:
        return "its blocks are not signs under one scale"
    return None


def refuse_groups(format: Format) -> str | None:
    """None, or why a row of ``format`` is not signs under one scale."""
    reason = refuse(format)
    return "it has more than one scale a row" if reason is None and format.block else reason


def matrix(format: Format, plus: Tensor, scale: Tensor) -> QTensor:
    """``scale`` (rows, blocks), positive, where ``plus`` (rows, columns) is true, and ``-scale`` elsewhere."""
    params = format.fit(scale.float().unsqueeze(-1), torch.ones(1, 1, 1))
    return QTensor.of(format, plus.to(F.code_dtype(format)).contiguous(), params)


def stored(format: Format, scale: Tensor) -> Tensor:
    """``scale`` (rows, blocks) as the format keeps it, float32."""
    params = format.fit(scale.float().unsqueeze(-1), torch.ones(1, 1, 1))
    return format.decode(torch.ones(*scale.shape, 1, dtype=F.code_dtype(format)), params).squeeze(-1)


def spread(format: Format, scale: Tensor, columns: int) -> Tensor:
    """``scale`` (rows, blocks) for every column, (rows, columns)."""
    return scale.repeat_interleave(B.width(columns, format.block), 1)[:, :columns]
