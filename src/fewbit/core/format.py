# SPDX-License-Identifier: Apache-2.0
"""Format: which values exist, given which parameters.

A format is a frozen value. It never sees a model, a file, a layout or a kernel. Blocks are float32
``(rows, blocks, block)``; codes are unsigned integers of the same shape (last axis divided by ``dim``); every
parameter is ``(rows, blocks, 1)``, already in the dtype in which it is stored, so that what is decoded is exactly
what a file decodes to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.core import blocks as B

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Param:
    """One stored parameter array of a format.

    ``bits`` are the bits an entry takes when stored; ``dtype`` is that of the array in memory. ``per`` says how
    many entries exist: one a block, one a span of ``fit_block`` columns, or one for the whole tensor.
    """

    name: str
    bits: int
    dtype: torch.dtype
    per: Literal["block", "span", "tensor"] = "block"


@dataclass(frozen=True)
class Physical:
    """What a kernel runs: ``w = scale * table[code] + offset``, with ``table[code] = code`` when there is no table.

    Shapes: ``scale`` and ``offset`` are float32 ``(rows, blocks)``; ``table`` is float32 ``(levels,)``.
    ``offset`` is None when it is zero everywhere.
    """

    scale: Tensor
    offset: Tensor | None
    table: Tensor | None

    @property
    def family(self) -> Literal["affine", "lut"]:
        return "affine" if self.table is None else "lut"


class Format(ABC):
    """Abstract; every concrete format is a frozen dataclass in :mod:`fewbit.formats`, and final.

    Facts (plain attributes or properties of each concrete class):

    * ``name``: the one-line spelling; ``formats.parse(f.name) == f``.
    * ``bits``: bits a code takes in a plain n-bit field. ``levels``: number of distinct codes (3 for ternary).
    * ``block``: columns that share block parameters, 0 for a whole row. ``fit_block``: columns whose parameters must
      be fitted together (0 whole row; at least ``block``). ``dim``: weights that one code stands for.
    * ``params``: what is stored beside the codes.
    """

    name: str
    bits: int
    levels: int
    block: int
    fit_block: int
    dim: int
    params: tuple[Param, ...]

    def bind(self, weight: Tensor) -> Format:
        """This format with its tensor-wide constants fixed from ``weight`` (rows, columns); itself when it has none."""
        return self

    @abstractmethod
    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Choose parameters for float32 ``blocks`` (rows, blocks, block).

        ``importance`` is non-negative, broadcastable to ``blocks``, and zero on padding (where ``blocks`` is zero as
        well): padding must not move a parameter. ``blocks`` holds whole spans, the last one possibly short.
        """

    @abstractmethod
    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        """Nearest code of every value, uint8; ``params`` broadcast against ``blocks``. Ties go to the even level."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Float32 values of ``codes``; computed as ``physical`` says, in float32."""

    def nearest(self, blocks: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """Codes, in any dtype, and their values: those of :meth:`encode` and :meth:`decode`, bit for bit.

        A format overrides it where it can spare the way through uint8; solvers call it once a column.
        """
        codes = self.encode(blocks, params)
        return codes, self.decode(codes, params)

    def working(self, params: Params) -> Params:
        """``params`` as :meth:`nearest` computes with them, for many calls with the same ones."""
        return params

    @abstractmethod
    def physical(self, params: Params) -> Physical:
        """The lossless lowering to a kernel family, from ``params`` of shape (rows, blocks, 1)."""


def fit(format: Format, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Parameters for a whole ``weight`` (rows, columns); ``importance`` (columns,) or (rows, columns), default 1."""
    columns = weight.shape[1]
    mask = B.present(columns, format.block, weight.device)
    if importance is not None:
        mask = B.split(importance.float().reshape(-1, columns), format.block)
    return format.fit(B.split(weight.float(), format.block), mask)


def encode(format: Format, weight: Tensor, params: Params) -> Tensor:
    """Codes of a whole ``weight``: (rows, columns) -> uint8 (rows, columns / dim)."""
    codes = format.encode(B.split(weight.float(), format.block), params)
    return B.join(codes, weight.shape[1] // format.dim).contiguous()


def decode(format: Format, codes: Tensor, params: Params) -> Tensor:
    """Float32 (rows, columns) from codes (rows, columns / dim)."""
    size = format.block // format.dim
    return B.join(format.decode(B.split(codes, size), params), codes.shape[1] * format.dim)
