# SPDX-License-Identifier: Apache-2.0
"""Tables of levels as integers of few bits, for products with activations that were rounded to int8."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.sums import all_finite
from fewbit.errors import InputError

MOST = 127
"""The largest level of a byte."""
LONGEST = 4
"""Bits of a code up to which levels are rounded to bytes. Those of longer codes lie too close together for that."""


def check_finite(format: Format, tables: Iterable[Tensor]) -> None:
    """Raises InputError where one of the ``tables`` of ``format`` holds NaN or infinity: no integer stands for them."""
    if not all(map(all_finite, tables)):
        raise InputError(f"a matrix of {format.name}", "its table holds NaN or infinity", "finite numbers would work")


def nearest_bytes(tables: Tensor) -> tuple[Tensor, Tensor]:
    """``step * level``, as near to float32 ``tables`` (n, levels) as bytes come: levels int32 (n, levels), and a step
    (n,) for each, of 16 significant bits, so that its multiples are float32 as well.

    Of the steps that make the largest entry 64 to 127 of them, the one with the least sum of squared errors; entries
    are wrong by at most 1/254 of the largest, or 2^-17 of it more.
    """
    largest = tables.abs().amax(1, keepdim=True)
    best, chosen = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for most in range(MOST // 2 + 1, MOST + 1):
        step = _short(largest / most)
        error = ((tables / step).round_().mul_(step)).sub_(tables).abs_()
        total = error.square().sum(1, keepdim=True)
        better = (total < best) & ((error.amax(1, keepdim=True) <= largest / (2 * MOST)) | (most == MOST))
        best, chosen = torch.where(better, total, best), torch.where(better, step, chosen)
    return (tables / chosen).round().int(), chosen[:, 0]


def as_integers(tables: Tensor) -> Tensor:
    """What an integer kernel multiplies for float32 ``tables`` (n, levels): whole multiples of a step. The very entries
    where they are such multiples, or where there are more than 2^:data:`LONGEST` of them, which the kernel rounds to 16
    bits; else those of :func:`nearest_bytes`."""
    if tables.shape[1] > 1 << LONGEST:
        return tables
    levels, step = nearest_bytes(tables)
    return torch.where(_whole(tables), tables, levels * step[:, None])


def _short(step: Tensor) -> Tensor:
    """``step`` with 16 significant bits, rounded; 1 where it is 0."""
    fraction, exponent = torch.frexp(step)
    return torch.where(step > 0, torch.ldexp((fraction * 2**16).round(), exponent - 16), 1.0)


def _whole(tables: Tensor) -> Tensor:
    """(n, 1): whether the entries of each table are multiples of its least that is not 0, at most 32767 of it."""
    size = tables.double().abs()
    ratio = size / torch.where(size > 0, size, torch.inf).amin(1, keepdim=True)
    return ((ratio == ratio.round()) & (ratio <= 2**15 - 1)).all(1, keepdim=True)
