# SPDX-License-Identifier: Apache-2.0
"""A matrix ready to multiply: repacked once for one kernel, then called for every batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.format import Format
from fewbit.core.layout import Layout
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import native, reference
from fewbit.kernels.table import Kernel
from fewbit.kernels.tile16 import ROWS, TILE16

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


DECODED = 48
"""Tokens from which on float products go through decoded weights: each is decoded once, and torch multiplies."""
STRIP = 1 << 19
"""Weights decoded at a time: 2 MiB of float32."""


class Prepared(ABC):
    """Abstract. ``prepared(x, bias)`` is ``x W^T + bias``: x (..., columns) in float32, bfloat16 or float16 ->
    (..., rows) in the same dtype, accumulated in float32. Differentiable in x.

    ``activation``: the format that x is rounded to first, token by token, or None. Gradients pass that rounding as if
    it were not there.
    """

    kernel: str
    shape: tuple[int, int]
    activation: Format | None

    @abstractmethod
    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (tokens, columns) in any of :data:`FLOATS` -> (tokens, rows), float32 or x's dtype."""

    @abstractmethod
    def qtensor(self) -> QTensor:
        """The very codes and parameters that this was made from, in the layout that is held here."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held: codes, and parameters both as stored and as the kernel reads them."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the matrix that one call with one token reads."""
        return self.nbytes

    def repack(self, layout: Layout) -> QTensor:
        """The same codes and parameters in another layout."""
        return self.qtensor().repack(layout)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``.

        Raises:
            InputError: the last axis of x is not the number of columns, or bias is not (rows,).
            UnsupportedError: x is on another device than the CPU, or not of a dtype above.
        """
        rows, columns = self.shape
        if x.shape[-1:] != (columns,):
            raise InputError(
                f"x of shape {tuple(x.shape)}", f"the matrix is {self.shape}", f"x of (..., {columns}) works"
            )
        if bias is not None and bias.shape != (rows,):
            raise InputError(
                f"bias of shape {tuple(bias.shape)}", f"the matrix is {self.shape}", f"({rows},) would work"
            )
        if x.dtype not in FLOATS or x.device.type != "cpu":
            works = "float32, bfloat16 and float16 on the CPU work"
            raise UnsupportedError(f"x in {x.dtype} on {x.device}", "kernels run on the CPU", works)
        flat = x.reshape(-1, columns)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            y = _Differentiable.apply(flat, bias, self)  # type: ignore[no-untyped-call]
        else:
            y = self.run(flat, bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], rows)  # type: ignore[no-any-return]


class ReferencePrepared(Prepared):
    """Any format and layout, dequantized a few rows at a time at every call."""

    kernel = "reference"

    def __init__(self, qtensor: QTensor, activation: Format | None = None) -> None:
        self._qtensor, self.shape, self.activation = qtensor, qtensor.shape, activation

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return reference.linear(reference.round_activations(x, self.activation), self._qtensor, bias)

    def qtensor(self) -> QTensor:
        return self._qtensor

    @property
    def nbytes(self) -> int:
        return self._qtensor.nbytes


def _tiles(values: Tensor) -> Tensor:
    """(rows, blocks) -> (tiles, blocks, 16), in float16 where that loses nothing."""
    values = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    values = values.reshape(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
    half = values.half()
    return half if torch.equal(half.float(), values) else values


def _shared_zero(scale: Tensor, offset: Tensor) -> float | None:
    """z such that ``offset == -scale * z`` bit for bit everywhere, for a z of whole halves; None when there is none."""
    ratio = float(-offset.flatten()[0] / scale.flatten()[0])
    zero = round(2 * ratio) / 2 if abs(ratio) < 2**20 else 0.0
    return zero if torch.equal(-scale * zero, offset) else None


class NativePrepared(Prepared):
    """Codes in tile16; ``w = scale * (table[code] - zero) + offset`` with scale and offset (tiles, blocks, 16)."""

    def __init__(self, qtensor: QTensor, kernel: Kernel, activation: Format | None = None) -> None:
        assert kernel.isa is not None and kernel.weights is not None
        self.kernel, self.shape, self.activation = kernel.name, qtensor.shape, activation
        self._isa = native.FLAGS[kernel.isa]
        self._family = native.FAMILIES[kernel.weights]
        self._x_block = 0  # of float products; a kernel of integers rounds x itself
        if kernel.integers:
            assert activation is not None
            self._x_block = B.width(self.shape[1], activation.block)
        self._stored = qtensor if qtensor.layout is TILE16 else qtensor.repack(TILE16)
        format = self._stored.format
        physical = format.physical(qtensor.logical()[1])
        blocks = (self.shape[0], B.count(self.shape[1], format.block))
        scale = physical.scale.float().expand(blocks)
        offset = None if physical.offset is None else physical.offset.float().expand(blocks)
        zero = None
        if offset is not None and physical.table is None:
            zero = _shared_zero(scale, offset)
        self._zero = zero or 0.0
        self._scale = _tiles(scale)
        self._offset = None if offset is None or zero is not None else _tiles(offset)
        self._table = None
        if physical.table is not None:
            self._table = torch.zeros(2**format.bits)
            self._table[: physical.table.numel()] = physical.table
        self._block = min(B.width(self.shape[1], format.block), self.shape[1])

    def _matrix(self) -> native.Matrix:
        offset, table = self._offset, self._table
        return (
            *self.shape,
            self._block,
            self._stored.format.bits,
            self._family,
            int(self._scale.dtype == torch.float16),
            int(offset is not None and offset.dtype == torch.float16),
            self._zero,
            self._stored.packed.data_ptr(),
            self._scale.data_ptr(),
            0 if offset is None else offset.data_ptr(),
            0 if table is None else table.data_ptr(),
        )

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.detach().float()
        if not self._x_block:
            x = reference.round_activations(x, self.activation)
        if x.stride(1) != 1:
            x = x.contiguous()
        tokens, rows = x.shape[0], self.shape[0]
        bias = None if bias is None else bias.detach().float().contiguous()
        y = torch.empty(tokens, rows)
        if tokens >= DECODED and not self._x_block:
            return self._decoded(x, bias, y)
        native.core().linear(
            self._matrix(),
            self._x_block,
            x.data_ptr(),
            x.stride(0),
            tokens,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            self._isa,
            torch.get_num_threads(),
        )
        return y

    def _decoded(self, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        """Decode strips of rows to float32, each once for all tokens, and let torch multiply."""
        rows, columns = self.shape
        strip = max(ROWS, STRIP // columns // ROWS * ROWS)
        weight = torch.empty(columns, min(strip, -(-rows // ROWS) * ROWS))  # (columns, rows of the strip)
        for row in range(0, rows, strip):
            tiles = row // ROWS, min(row + strip, rows + ROWS - 1) // ROWS
            native.core().decode(
                self._matrix(), *tiles, weight.data_ptr(), weight.shape[1], self._isa, torch.get_num_threads()
            )
            torch.mm(x, weight[:, : min(strip, rows - row)], out=y[:, row : row + strip])
        return y if bias is None else y.add_(bias)

    def qtensor(self) -> QTensor:
        return self._stored

    @property
    def read_bytes(self) -> int:
        read = (t for t in (self._stored.packed, self._scale, self._offset, self._table) if t is not None)
        return sum(t.numel() * t.element_size() for t in read)

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes - self._stored.packed.numel() + self.read_bytes


class _Differentiable(torch.autograd.Function):
    """Forward through the kernel, backward through the dequantized weight; the weight itself is constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, prepared: Prepared) -> Tensor:
        ctx.prepared, ctx.has_bias = prepared, bias is not None
        return prepared.run(x, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        bias = gradient.sum(0) if ctx.has_bias else None
        return reference.backward(gradient, ctx.prepared.qtensor()), bias, None
