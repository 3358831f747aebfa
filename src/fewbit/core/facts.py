# SPDX-License-Identifier: Apache-2.0
"""Facts: what calibration saw at the input of a layer. A monoid: collect anywhere, merge in a fixed order.

Sums, not means, so that merging is exact in the order it is done; every mean is derived.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fewbit.core.observers import Seen
from fewbit.core.sums import column_sums
from fewbit.errors import InputError

R = TypeVar("R")
TILE = 128
"""Columns whose part of the second moment is one square product; see :class:`Accumulator`."""


Need = Literal["nothing", "largest", "mean_square", "fisher", "gram"]
"""What is asked of calibration: max|x|, E[x^2], that and the Fisher diagonal of the weight, E[x x^T].

The Fisher diagonal comes from a pass of its own (:mod:`fewbit.run.sensitivity`), whatever is collected at the inputs,
and with it the squared gradients at the outputs.
"""
_NEEDS: tuple[Need, ...] = ("nothing", "largest", "mean_square", "fisher", "gram")


def strongest(*needs: Need) -> Need:
    """The need among these whose facts serve all of them."""
    return max(needs, key=_NEEDS.index, default="nothing")


@dataclass(frozen=True, eq=False)
class Facts:
    """Statistics of the inputs ``x`` (tokens, columns) of one layer.

    ``total``, ``total_square``, ``largest``: (columns,) sums of x and x^2 and max|x|, float32. ``largest`` is None
    where it cannot be known: of inputs that were rotated after they were seen.
    ``gram``: (columns, columns) float32 sum of x x^T, symmetric bit for bit, or None when no method asked for it.
    ``total_magnitude``: (columns,) sum of |x|, float32; None where ``largest`` is.
    ``fisher``: (rows, columns) float32, of the layer's weight: the sum over sequences of the squared gradient of a
    sequence's loss, or None when no method asked for it.
    ``output_square``: (rows,) float32, of the layer's outputs: the sum over tokens of the squared gradient of their
    sequence's loss; None where ``fisher`` is, or where it was not collected.
    ``ranges``: what observers fix a grid by; None where nobody asked, and of inputs that were rewritten since.
    ``ends``: (2, columns) least and largest x, float32; None where ``ranges`` was not asked for, and ``largest`` is.
    """

    columns: int
    tokens: int
    total: Tensor
    total_square: Tensor
    largest: Tensor | None
    gram: Tensor | None = None
    total_magnitude: Tensor | None = None
    fisher: Tensor | None = None
    output_square: Tensor | None = None
    ranges: Seen | None = None
    ends: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def none(columns: int, gram: bool = False) -> Facts:
        """No token seen: the identity of :meth:`merge`."""
        total, square, largest, magnitude = torch.zeros(4, columns, dtype=torch.float32).unbind()
        return Facts(
            columns,
            0,
            total,
            square,
            largest,
            torch.zeros(columns, columns, dtype=torch.float32) if gram else None,
            magnitude,
        )

    @staticmethod
    def of(x: Tensor, gram: bool = False, ranges: bool = False) -> Facts:
        """From inputs of shape (..., columns): one batch."""
        found = Accumulator.of(x, gram).facts()
        return replace(found, ranges=Seen.of(x), ends=_ends(x)) if ranges else found

    def merge(self, other: Facts) -> Facts:
        """Facts of both streams together.

        Raises:
            InputError: the two are of inputs of different widths.
        """
        if self.columns != other.columns:
            raise InputError(
                f"facts of {self.columns} columns merged with facts of {other.columns}",
                "they describe different layers",
                "merge facts of one layer only",
            )
        largest = None
        if self.largest is not None and other.largest is not None:
            largest = torch.maximum(self.largest, other.largest)
        return Facts(
            self.columns,
            self.tokens + other.tokens,
            self.total + other.total,
            self.total_square + other.total_square,
            largest,
            _sum(self.gram, other.gram),
            _sum(self.total_magnitude, other.total_magnitude),
            _sum(self.fisher, other.fisher),
            _sum(self.output_square, other.output_square),
            None if self.ranges is None or other.ranges is None else self.ranges.merge(other.ranges),
            None if self.ends is None or other.ends is None else _wider(self.ends, other.ends),
        )

    def once(self, key: Hashable, make: Callable[[], R]) -> R:
        """What ``make`` gives, known by ``key`` as long as these facts are there: layers that share an input share what
        is worked out of it. (Threads that ask at once may both work it out.)"""
        if key not in self._made:
            self._made[key] = make()
        made: R = self._made[key]
        return made

    @property
    def mean_square(self) -> Tensor:
        """E[x^2], (columns,); all ones when no token was seen, which is what rounding assumes."""
        return self.total_square / self.tokens if self.tokens else torch.ones(self.columns, dtype=torch.float32)

    @property
    def second_moment(self) -> Tensor:
        """E[x x^T], (columns, columns); the identity when no token was seen."""
        if self.gram is None or not self.tokens:
            return torch.eye(self.columns, dtype=torch.float32)
        return self.gram / self.tokens


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """None unless both streams have it."""
    return None if one is None or other is None else one + other


def _ends(x: Tensor) -> Tensor:
    """Least and largest entry of each column of ``x`` (..., columns); of no token, the infinities that any exceeds."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    if not len(rows):
        return torch.tensor([[torch.inf], [-torch.inf]], dtype=torch.float32).repeat(1, x.shape[-1])
    return torch.stack(torch.aminmax(rows, dim=0))


def _wider(one: Tensor, other: Tensor) -> Tensor:
    """Of both streams together."""
    return torch.stack((torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])))


class Accumulator:
    """Facts of a stream of inputs, summed in place: one matrix of memory, no copy a batch.

    Only the upper triangle of the second moment is summed, cut in halves down to ``TILE`` columns (a little over half
    the work of the full product); the lower one is mirrored when the facts are read.

    Args:
        columns: width of the inputs.
        gram: also sum x x^T.
    """

    def __init__(self, columns: int, gram: bool = False) -> None:
        self.columns = columns
        self.tokens = 0
        self._total = torch.zeros(columns, dtype=torch.float32)
        self._total_square = torch.zeros(columns, dtype=torch.float32)
        self._total_magnitude = torch.zeros(columns, dtype=torch.float32)
        self._largest = torch.zeros(columns, dtype=torch.float32)
        self._upper = torch.zeros(columns, columns, dtype=torch.float32) if gram else None

    def add(self, x: Tensor) -> None:
        """Add inputs of shape (..., columns), any float dtype; products are taken in float32.

        Raises:
            InputError: the last axis is not ``columns`` long.
        """
        if x.shape[-1] != self.columns:
            raise InputError(
                f"facts of {self.columns} columns from inputs of shape {tuple(x.shape)}",
                f"the last axis has {x.shape[-1]} entries",
                "pass the inputs of that layer, (..., columns)",
            )
        x = x.detach().reshape(-1, self.columns).float()
        if x.shape[0] == 0:
            return
        self.tokens += x.shape[0]
        total, square, magnitude, largest = column_sums(x)
        self._total += total
        self._total_square += square
        self._total_magnitude += magnitude
        self._largest = torch.maximum(self._largest, largest)
        if self._upper is not None:
            _add_upper(self._upper, x, 0, self.columns)

    @staticmethod
    def of(x: Tensor, gram: bool = False) -> Accumulator:
        """One that has seen ``x`` (..., columns)."""
        accumulator = Accumulator(x.shape[-1], gram)
        accumulator.add(x)
        return accumulator

    def join(self, other: Accumulator) -> Accumulator:
        """Add what ``other`` has seen, in place: bit for bit what :meth:`Facts.merge` of both makes."""
        if self.columns != other.columns or (self._upper is None) != (other._upper is None):
            raise InputError(
                f"facts of {self.columns} columns joined with facts of {other.columns}",
                "they describe different layers",
                "join facts of one layer only",
            )
        self.tokens += other.tokens
        self._total += other._total
        self._total_square += other._total_square
        self._total_magnitude += other._total_magnitude
        self._largest = torch.maximum(self._largest, other._largest)
        if self._upper is not None and other._upper is not None:
            self._upper += other._upper
        return self

    def facts(self) -> Facts:
        """What was seen so far; later :meth:`add` calls do not change it."""
        gram = None
        if self._upper is not None:
            gram = self._upper.triu()
            gram += self._upper.triu(1).T
        return Facts(
            self.columns,
            self.tokens,
            self._total.clone(),
            self._total_square.clone(),
            self._largest.clone(),
            gram,
            self._total_magnitude.clone(),
        )


def half(columns: int) -> int:
    """How many of ``columns`` come first where a triangle of products is cut in two: a multiple of 16."""
    return -(-columns // 32) * 16


def _add_upper(upper: Tensor, x: Tensor, first: int, last: int) -> None:
    """Add the upper triangle of x^T x, columns ``first`` to ``last``, to ``upper``."""
    columns = x[:, first:last].T
    if last - first <= TILE:
        upper[first:last, first:last].addmm_(columns, columns.T)
        return
    middle = first + half(last - first)
    _add_upper(upper, x, first, middle)
    upper[first:middle, middle:last].addmm_(columns[: middle - first], x[:, middle:last])
    _add_upper(upper, x, middle, last)
