# SPDX-License-Identifier: Apache-2.0
"""Activations on their way into a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import native

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

CENTRE = 128
"""Of the codes of int8 activations, which kernels multiply less it. A grid whose zero is another code is corrected by
what its distance from the centre makes of the sum of each row, which joins the bias."""


def check_bias(bias: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises InputError where there is one that is not (rows,) for a matrix of ``shape``, UnsupportedError where it is
    on another device than the CPU."""
    if bias is None:
        return
    if bias.shape != (shape[0],):
        found = f"the matrix is {shape}"
        raise InputError(f"bias of shape {tuple(bias.shape)}", found, f"({shape[0]},) would work")
    if not bias.is_cpu:
        raise UnsupportedError(f"bias on {bias.device}", "kernels run on the CPU", "bias.cpu() works")


def check_supported(x: Tensor) -> None:
    """Raises UnsupportedError where ``x`` is on another device than the CPU, sparse, not of a float of 16 or 32 bits,
    or stands for other tensors, whose computation is being recorded: kernels read memory, and leave no trace."""
    if x.dtype not in native.DTYPES or not x.is_cpu or x.layout is not torch.strided:
        works = "float32, bfloat16 and float16 on the CPU work"
        dense = "" if x.layout is torch.strided else f" and {x.layout}"
        raise UnsupportedError(f"x in {x.dtype}{dense} on {x.device}", "kernels run on the CPU", works)
    check_memory(x)


def check_memory(x: Tensor) -> None:
    """Raises UnsupportedError where ``x`` stands for other tensors, whose computation is being recorded."""
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ or torch._C._get_tracing_state() is not None:
        found = f"kernels read the memory of x, and {type(x).__name__} here stands for what is recorded"
        works = "torch.compile works, without fullgraph: kernels run between its graphs"
        raise UnsupportedError("a graph of a kernel (torch.export, torch.jit.trace)", found, works)


def uncompiled(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """``function`` as one call to torch.compile, whose graphs end before it and begin after it. (It imports what
    compiles, which takes seconds: of layers, which come with transformers, that has it already.)"""
    return cast("Callable[_Given, _Made]", torch.compiler.disable(function))


def exact(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """``function`` computed in the dtypes that it names: torch's autocast would round the operands of its products to
    bfloat16, and refuses to join arrays of float16. And as it is written: torch.compile, which could follow its Python
    alone, takes minutes over what a matrix is prepared by, and warns of what it makes of caches."""

    @functools.wraps(function)
    def run(*given: _Given.args, **named: _Given.kwargs) -> _Made:
        if torch.compiler.is_dynamo_compiling():
            return uncompiled(function)(*given, **named)
        if not torch.is_autocast_enabled("cpu"):
            return function(*given, **named)
        with torch.autocast("cpu", enabled=False):
            return function(*given, **named)

    return run


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd must hear of what is computed from ``tensors``: also of a tangent of forward mode, which it then
    refuses, where a kernel would drop it."""
    there = [t for t in tensors if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in there):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in there)


def given(x: Tensor) -> tuple[Tensor, native.Input]:
    """x (..., columns), and where the core finds its tokens; copied only where they do not lie equally far apart, or
    memory holds their negatives."""
    columns = x.shape[-1]
    if x.is_neg():
        x = x.resolve_neg()
    if not x.is_contiguous():
        x = x.reshape(-1, columns)
    stride, step = (columns, 1) if x.is_contiguous() else x.stride()
    return x, (x.data_ptr(), x.numel() // columns, stride, step, native.DTYPES[x.dtype])


def grid_of_call(x: Tensor, activation: Format) -> tuple[float, int]:
    """Scale and zero of the one symmetric grid that all of x (..., columns) is rounded to, as ``activation`` fits it.
    The scale is NaN where x holds NaN or infinity, which leaves no scale to any token."""
    flat = x.reshape(-1, x.shape[-1]).float()
    if not flat.numel():
        return 1.0, CENTRE
    scale = F.fit(activation, flat)["scale"].flatten()[0]
    return float(torch.where(flat.abs().amax().isfinite(), scale.float(), torch.nan)), CENTRE
