# SPDX-License-Identifier: Apache-2.0
"""Access to the arrays of a file: a missing or misshapen one is an error that names it; arrays and their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Params
from fewbit.errors import InputError


def expect(what: str, found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``found``, refused when it has another shape.

    Raises:
        InputError: with both shapes in the message.
    """
    if tuple(found.shape) != shape:
        raise InputError(f"{what} of shape {shape}", f"found {tuple(found.shape)}")
    return found


def expect_bytes(what: str, found: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``found``, contiguous: the core reads such bytes to their end.

    Raises:
        InputError: it has another shape, or is no uint8.
    """
    if expect(what, found, shape).dtype != torch.uint8:
        raise InputError(what, f"found {found.dtype}", "uint8 would work")
    return found.contiguous()


def take(stored: Params, name: str, shape: tuple[int, ...]) -> Tensor:
    """The array ``name`` of ``stored``.

    Raises:
        InputError: it is absent or has another shape.
    """
    if name not in stored:
        raise InputError(f"array {name!r} of shape {shape}", f"found {', '.join(stored) or 'no arrays'}")
    return expect(name, stored[name], shape)


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of each entry: (..., n) of b bytes an entry -> uint8 (..., n b)."""
    return values.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def of_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`as_bytes`. (A copy, because a view needs strides that axes of length 1 need not have.)"""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)
