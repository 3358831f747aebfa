# SPDX-License-Identifier: Apache-2.0
"""What every row of ``bench/kernels.py`` is made of, ours and the peers': one matrix that somebody's kernel can
multiply by, in as many copies as keep it out of the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

LAST_LEVEL = 32 << 20
"""Bytes of the last-level cache that cores of this class share."""
ROTATE = 3 * LAST_LEVEL + (1 << 20)
"""Bytes of distinct weights that a row goes through, one copy a call."""
SAMPLE = 64
"""Rows of the output whose error is computed."""

Call = Callable[[], object]


class Unavailable(Exception):
    """This row cannot be measured here; the message says why, and how to get it."""


@dataclass(frozen=True)
class Problem:
    """The product y = x W^T on ``threads`` threads: ``weight`` (rows, columns) and ``x`` (tokens, columns), float32.

    ``cached``: one copy of the weight is enough, for it may stay in the cache.
    """

    weight: Tensor
    x: Tensor
    threads: int
    cached: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])


@dataclass(frozen=True)
class Prepared:
    """A matrix ready to be multiplied.

    ``kernel``: what will run, as its engine calls it. ``nbytes``: what one copy stores, scales included. ``calls``:
    each computes y with another copy. ``y`` (tokens, SAMPLE or more): what the first call gave. ``held`` (SAMPLE,
    columns): the first rows of the very weight that it holds, so that the error is the kernel's and not that of
    rounding the weight.
    """

    kernel: str
    nbytes: int
    calls: list[Call]
    y: Tensor
    held: Tensor

    def error(self, x: Tensor) -> float:
        """Norm of the difference to float64 over the norm of the answer, on the first SAMPLE rows."""
        answer = x.double() @ self.held[:SAMPLE].double().T
        return float((self.y[:, :SAMPLE].double() - answer).norm() / answer.norm())


@dataclass(frozen=True)
class Row:
    """One kernel to measure.

    ``engine``: whose it is. ``codes``: bits of a code over the weights that it stands for, by which rows are compared.
    ``activations``: what x is rounded to inside ("float32" where it is not); "int" in front means products of integers.
    ``prepare`` raises :class:`Unavailable`.
    """

    engine: str
    name: str
    codes: float
    activations: str
    prepare: Callable[[Problem], Prepared]

    @property
    def integer(self) -> bool:
        return self.activations.startswith("int")


def rotated(problem: Problem, nbytes: int, make: Callable[[], Call]) -> list[Call]:
    """As many calls, each with a copy of its own, as go through ROTATE bytes; one where the weight may stay cached."""
    return [make() for _ in range(1 if problem.cached else -(-ROTATE // nbytes))]


def round_affine(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Plain symmetric rounding: codes (rows, columns) in [0, 2^bits), and scales (rows, columns / block), of which
    ``w = scale * (code - 2^(bits-1))``."""
    parts = weight.reshape(weight.shape[0], -1, block)
    half = 2 ** (bits - 1)
    scale = (parts.abs().amax(-1) / (half - 0.5)).clamp(min=1e-8)
    codes = (parts / scale[..., None] + half).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8).reshape(weight.shape), scale


def grouped(reasons: Iterable[tuple[Row, str]]) -> list[str]:
    """One line a reason: which rows are missing, and why."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row, reason in reasons:
        lines.setdefault((row.engine, reason), []).append(row.name)
    return [f"not measured: {engine} {', '.join(names)}: {reason}" for (engine, reason), names in lines.items()]
