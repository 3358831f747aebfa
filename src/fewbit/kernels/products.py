# SPDX-License-Identifier: Apache-2.0
"""Products of two activations, both rounded to a grid, in integers: what attention multiplies by one another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbit.errors import InputError, UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.kernels import native, pages, reference
from fewbit.kernels.inputs import check_supported, exact, wants_gradients

MOST_INNER = 1 << 15
"""Products of two codes of 8 bits less their zeros that an int32 holds."""


@exact
def matmul(a: Tensor, b: Tensor, left: Fixed, right: Fixed) -> Tensor:
    """``a b`` of codes: a (..., rows, inner), rounded to ``left``, and b (..., inner, columns), rounded to ``right`` ->
    (..., rows, columns) in their dtype. With codes q and zeros z of both, ``sum (q_a - z_a) (q_b - z_b)`` is an exact
    integer. Differentiable in both, gradients passing the rounding as if it were not there.

    Raises:
        InputError: shapes contradict one another, or dtypes differ.
        UnsupportedError: they are on another device than the CPU, of another dtype than float32, bfloat16 and float16,
            or inner is above :data:`MOST_INNER`.
    """
    check_supported(a)
    check_supported(b)
    if a.dtype != b.dtype or min(a.dim(), b.dim()) < 2 or a.shape[-1] != b.shape[-2]:
        found = f"b is {tuple(b.shape)} in {b.dtype}"
        raise InputError(f"a of {tuple(a.shape)} in {a.dtype}, times b", found, "(..., rows, n) and (..., n, columns)")
    if a.shape[-1] > MOST_INNER:
        found = f"an int32 holds sums of at most {MOST_INNER}"
        raise UnsupportedError(f"sums of {a.shape[-1]} products of codes", found, "a product in float")
    if wants_gradients(a, b):
        return _Differentiable.apply(a, b, left, right)  # type: ignore[no-untyped-call, no-any-return]
    return _run(a, b, left, right)


def _run(a: Tensor, b: Tensor, left: Fixed, right: Fixed, isa: native.Isa | None = None) -> Tensor:
    """On the instruction set named, or the best one here."""
    for grid in (left, right):
        grid.check()
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    y = pages.fresh(*leading, a.shape[-2], b.shape[-1])
    if not native.available() or not y.numel() or not a.shape[-1]:
        return reference.integer_matmul(a, b, left, right).to(a.dtype)
    first, second = (_matrices(x.detach().resolve_neg().float(), leading) for x in (a, b))
    outer, middle, rows, inner = first.shape
    native.core().int8_matmul(
        _members(first, left),
        _members(second, right),
        outer,
        middle,
        rows,
        inner,
        b.shape[-1],
        y.data_ptr(),
        native.FLAGS[isa or native.isas()[0]],
        torch.get_num_threads(),
    )
    return y.to(a.dtype)


def _matrices(x: Tensor, leading: torch.Size) -> Tensor:
    """(outer, middle, rows, columns), copied only where two strides do not reach all matrices."""
    x = x.expand(*leading, *x.shape[-2:])
    if len(leading) > 2:
        return x.flatten(0, -4)
    return x[(None,) * (2 - len(leading))]


def _members(x: Tensor, grid: Fixed) -> native.Operand:
    outer, middle, row, column = x.stride()
    return x.data_ptr(), outer, middle, row, column, grid.scale, grid.zero, grid.bits


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, left: Fixed, right: Fixed) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.grids = left, right
        return _run(a, b, left, right)

    @staticmethod
    @exact
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of the product of what the operands are rounded to."""
        (gradient,) = gradients
        rounded = (reference.round_activations(x, grid) for x, grid in zip(ctx.saved_tensors, ctx.grids, strict=True))
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in rounded]
            found = torch.autograd.grad(leaves[0] @ leaves[1], leaves, gradient)
        return *found, None, None
