# SPDX-License-Identifier: Apache-2.0
"""A format whose parameters are whatever a test says: any scale, any offset, any table, on any block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core import format as F
from fewbit.core.format import Format, Param, Params, Physical, Vectors
from fewbit.core.qtensor import QTensor


@dataclass(frozen=True)
class Raw(Format):
    """``w = scale * table[code] + offset``; ``table`` () is the code itself."""

    bits: int
    block: int
    table: tuple[float, ...] = ()
    dim = 1

    @property
    def name(self) -> str:
        return f"raw{self.bits}/g{self.block}/{'lut' if self.table else 'affine'}"

    @property
    def levels(self) -> int:
        return len(self.table) or 2**self.bits

    @property
    def params(self) -> tuple[Param, ...]:
        return (Param("scale", 32, torch.float32), Param("offset", 32, torch.float32))

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        scale = blocks.abs().amax(-1, keepdim=True)
        return {"scale": scale, "offset": torch.zeros_like(scale)}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        return torch.zeros_like(blocks, dtype=torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        level = torch.tensor(self.table, dtype=torch.float32)[codes.long()] if self.table else codes.float()
        return params["scale"] * level + params["offset"]

    def physical(self, params: Params) -> Physical:
        table = torch.tensor(self.table, dtype=torch.float32) if self.table else None
        return Physical(params["scale"].squeeze(-1), params["offset"].squeeze(-1), table)


@dataclass(frozen=True)
class Exact:
    """A matrix, and per weight the magnitude that its computation passes through and the largest that its table could
    give, all float64 (rows, columns)."""

    qtensor: QTensor
    weight: Tensor
    magnitude: Tensor
    largest: Tensor
    operations: int

    def answer(
        self, x: Tensor, bias: Tensor | None, table_error: float = 0.0, product_error: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(y, bound): float64 ``x W^T + bias``, and eps times the operations on a weight's longest path times the
        sum of magnitudes. ``table_error``: of a table's entries, relative to the largest; of bytes of a book, to what
        a step would be if it were not 1/255."""
        y = x.double() @ self.weight.T
        inexact = table_error * (x.double().abs() @ self.largest.T)
        inexact += product_error * x.double().abs().amax(-1, keepdim=True) * self.largest.sum(1)
        size = x.double().abs() @ self.magnitude.T
        if bias is not None:
            y, size = y + bias.double(), size + bias.double().abs()
        return y, 2.0**-24 * self.operations * size + inexact


def exact(qtensor: QTensor) -> Exact:
    """The float64 matrix of any QTensor, from its physical form; its magnitude counts a zero and an offset apart."""
    format, (rows, columns) = qtensor.format, qtensor.shape
    codes, params = qtensor.logical()
    physical = format.physical(params)
    if isinstance(physical, Vectors):
        weight = F.decode(format, codes, params)[:rows].double()
        # bytes are wrong by half a step a book, a step being 1/255 of all ranges
        ranges = (
            sum((book.amax(1) - book.amin(1) for book in physical.books), torch.zeros(())) * len(physical.books) / 2
        )
        at = torch.arange(columns) // (format.block or columns)
        largest = ranges.double()[at].T.repeat(len(codes), 1)[:rows]
        return Exact(qtensor, weight, weight.abs(), largest, columns + 2)
    block = format.block or columns
    at = torch.arange(columns) // block
    scale = physical.scale.double().expand(rows, -1)[:, at]
    offset = torch.zeros(()) if physical.offset is None else physical.offset.double().expand(rows, -1)[:, at]
    level = codes.double()
    if physical.table is not None:
        tables = physical.table.double().reshape(-1, physical.table.shape[-1])  # one, or one for each row
        level = tables.expand(rows, -1).gather(1, codes.long())
    largest = scale.abs() * (0 if physical.table is None else physical.table.double().abs().max())
    operations = min(block, columns) + -(-columns // block) + 12
    return Exact(qtensor, scale * level + offset, (scale * level).abs() + offset.abs(), largest, operations)
