# SPDX-License-Identifier: Apache-2.0
"""A matrix ready to multiply: repacked once for one kernel, then called for every batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.core import given
from fewbit.core.format import Format
from fewbit.core.layout import Layout
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Terms
from fewbit.errors import InputError
from fewbit.kernels import reference
from fewbit.kernels.copies import again, parts
from fewbit.kernels.inputs import check_bias, check_supported, exact, wants_gradients
from fewbit.kernels.table import Kernel


class Prepared(ABC):
    """Abstract: a weight ready to multiply. ``prepared(x, bias)`` is ``x W^T + bias``: x (..., columns) in float32,
    bfloat16 or float16 -> (..., rows) in the same dtype, accumulated in float32. Differentiable in x.

    ``activation``: the format that x is rounded to first, token by token, or None. Gradients pass that rounding as if
    it were not there.
    """

    kernel: str
    shape: tuple[int, int]
    activation: Format | None

    company: tuple[object, ...] | None = None
    """Matrices that agree in this are computed in one call of the core; None: each by itself."""

    @abstractmethod
    def run(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """x (..., columns) in float32, bfloat16 or float16 -> (..., rows) in ``dtype``, or that of x; no gradients."""

    def inputs(self, x: Tensor) -> Tensor:
        """What a call multiplies x (..., columns) as, in float32: rounded to :attr:`activation`, and by the kernel."""
        return reference.round_activations(x.float(), self.activation)

    @abstractmethod
    def backward(self, gradient: Tensor) -> Tensor:
        """``gradient W``, of the dequantized weight: gradient of the output (..., rows) -> that of x (..., columns)."""

    @abstractmethod
    def weight(self) -> QTensor | Terms:
        """The very codes and parameters that this was made from, in the layouts that are held here."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held: codes, and parameters both as stored and as the kernel reads them."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the matrix that one call with one token reads."""
        return self.nbytes

    def check(self, x: Tensor, bias: Tensor | None) -> None:
        """Raise what :meth:`__call__` says of wrong arguments."""
        given.kind("x", x, Tensor, f"a tensor (..., {self.shape[1]})")
        given.optional("bias", bias, Tensor, f"a tensor ({self.shape[0]},)")
        columns = self.shape[1]
        if not x.ndim or x.shape[-1] != columns:
            raise InputError(
                f"x of shape {tuple(x.shape)}", f"the matrix is {self.shape}", f"x of (..., {columns}) works"
            )
        check_bias(bias, self.shape)
        check_supported(x)

    @exact
    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``.

        Raises:
            SpecError: x or bias is no tensor.
            InputError: the last axis of x is not the number of columns, or bias is not (rows,).
            UnsupportedError: x is on another device than the CPU, or not of a dtype above.
        """
        self.check(x, bias)
        if wants_gradients(x, bias):
            return _Differentiable.apply(x, bias, self)  # type: ignore[no-untyped-call,no-any-return]
        return self.run(x, bias)


class PreparedMatrix(Prepared):
    """Abstract: one quantized matrix. Copied and pickled as its codes and parameters, which are prepared anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        return again, parts(type(self), self.qtensor(), self.kernel, self.activation)

    @abstractmethod
    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        """The weights as float32, a few rows at a time: (which rows, their weights (rows of the strip, columns))."""

    @abstractmethod
    def qtensor(self) -> QTensor:
        """The very codes and parameters that this was made from, in the layout that is held here."""

    def weight(self) -> QTensor:
        return self.qtensor()

    def repack(self, layout: Layout) -> QTensor:
        """The same codes and parameters in another layout."""
        return self.qtensor().repack(layout)

    def backward(self, gradient: Tensor) -> Tensor:
        return reference.backward(gradient, self.qtensor())


def stored(qtensor: QTensor, kernel: Kernel) -> QTensor:
    """``qtensor`` in the layout that ``kernel`` takes its codes in, whose bytes lie one after the other."""
    made = qtensor.repack(kernel.arranged(qtensor.format))
    return made if made.packed.is_contiguous() else replace(made, packed=made.packed.contiguous())


class _Differentiable(torch.autograd.Function):
    """Forward through the kernel, backward through the dequantized weight; the weight itself is constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, prepared: Prepared) -> Tensor:
        ctx.prepared, ctx.has_bias = prepared, bias is not None
        return prepared.run(x, bias)

    @staticmethod
    @exact
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if ctx.has_bias else None
        return ctx.prepared.backward(gradient), bias, None
