# SPDX-License-Identifier: Apache-2.0
"""BiLLM: two binarizations of every weight, salient columns by residuals, the others split by their magnitude.

Huang et al. 2024, arXiv:2402.04291. In blocks of columns, of every row, the salient columns (those of largest
``sum_o W_oi^2 / U_ii^2``, U the upper Cholesky factor of the inverse second moment) are binarized twice::

    a1 sign(w) + a2 sign(w - a1 sign(w)),     a1 = mean |w|,  a2 = mean |w - a1 sign(w)|

and the others by the sign alone, in two groups: ``a_c sign(w)`` where ``|w| <= p`` and ``a_s sign(w)`` beyond, p being
the threshold that loses least. Errors are passed on to later columns as in GPTQ. Which group a weight is in takes a bit
as well, so both kinds are the same thing on disk, the sum of two matrices of signs::

    +-a_c, +-a_s = m s + d t,     m = (a_s + a_c) / 2,  d = (a_s - a_c) / 2,  t = s where |w| is large, else -s

That is 2 bits and two scales a block; the paper's 1.08 to 1.1 bits leave the groups out. Where we depart from the
authors' code:

* salient columns are a fixed share, in whole blocks, put first (theirs: up to 50 in every block of 128, by search);
* no mean is subtracted: with two means of 16 bits a block, theirs takes 2.88 bits;
* p is chosen for every row of a block, and columns make up for errors within a block too (theirs: for later blocks);
* a row that ends worse than without error feedback goes without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.terms import Columns, Dense, Terms, foremost, index_dtype
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import feedback, objective, signs


@exact()
def billm(
    weight: Tensor, format: Format, facts: Facts, *, salient: float = 0.1, damp_percent: float = 0.01, points: int = 9
) -> Terms:
    """Quantize ``weight`` (rows, columns) to two matrices of signs.

    Args:
        weight: float, (rows, columns).
        format: signs; the paper's blocks are of 128 columns (``sign/g128``).
        facts: with the second moment. Without any token no error is passed on.
        salient: share of the columns that are binarized by residuals: rounded to whole blocks, at least one.
        damp_percent: as in GPTQ.
        points: thresholds tried, evenly between zero and the largest magnitude of a block.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no second moment).
        SpecError: an option is out of range. UnsupportedError: a block of ``format`` is not signs under one scale.
    """
    _check(weight, format, facts, salient, points)
    weight, moment, columns = weight.float(), facts.second_moment, weight.shape[1]
    width = B.width(columns, format.block)
    number = max(1, round(salient * columns / width)) if salient else 0
    worth = weight.square().sum(0, dtype=torch.float64) * feedback.factorize(moment, damp_percent).pivots
    order = foremost(worth, number * width)
    plain, solved = (_Planes(format, order, len(weight), number, points) for _ in range(2))
    for first in range(0, columns, width):
        block = weight[:, order[first : first + width]]
        plain.enter(first, block)
        for column, values in enumerate(block.T, first):
            plain.round(column, values)
    passing = feedback.factorize(moment[order][:, order], damp_percent)
    feedback.sweep(weight[:, order], passing, solved.round, max(128, width), solved.enter, width)
    lost, least = (objective.row_errors(weight - planes.terms().dequantize(), facts) for planes in (solved, plain))
    return solved.or_else(plain, lost > least).terms()


def _check(weight: Tensor, format: Format, facts: Facts, salient: float, points: int) -> None:
    asked = objective.asked("billm", weight, format)
    objective.check("billm", weight, format, facts)
    if (reason := signs.refuse(format)) is not None:
        raise UnsupportedError(asked, reason, "sign/g128 would work")
    objective.check_moment("billm", weight, format, facts)
    if not 0 <= salient <= 1 or points < 1:
        raise SpecError(f"{asked} with salient={salient}, points={points}", "out of range", "0.1 and 9 are usual")


class _Planes:
    """Both matrices in the making, a block and then its columns at a time, columns in ``order``.

    ``scales``: m and d, (2, rows, blocks), as they are stored; ``codes``: s and t, (2, rows, columns), true where plus.
    """

    def __init__(self, format: Format, order: Tensor, rows: int, salient: int, points: int) -> None:
        self._format, self._order, self._salient, self._points = format, order, salient, points
        self._width = B.width(len(order), format.block)
        self._scales = torch.zeros(2, rows, B.count(len(order), format.block))
        self._codes = torch.zeros(2, rows, len(order), dtype=torch.bool)

    def enter(self, first: int, values: Tensor) -> None:
        """Fit the scales of the block that begins with column ``first`` to its ``values`` (rows, columns)."""
        block = first // self._width
        found = residual(values) if block < self._salient else split(values, self._points)
        for plane, scale in zip(self._scales, found, strict=True):
            plane[:, block] = signs.stored(self._format, scale.unsqueeze(1)).squeeze(1)

    def round(self, column: int, values: Tensor) -> Tensor:
        """The nearest of the four values of each row."""
        middle, apart = self._scales[:, :, column // self._width]
        plus, large = values > 0, values.abs() > middle
        self._codes[0, :, column], self._codes[1, :, column] = plus, plus == large
        magnitude = torch.where(large, middle + apart, middle - apart)
        return torch.where(plus, magnitude, -magnitude)

    def or_else(self, other: _Planes, rows: Tensor) -> _Planes:
        """These, but those of ``other`` where ``rows`` (rows,) is true."""
        result = _Planes(self._format, self._order, len(rows), self._salient, self._points)
        at = rows[None, :, None]
        result._scales = torch.where(at, other._scales, self._scales)
        result._codes = torch.where(at, other._codes, self._codes)
        return result

    def terms(self) -> Terms:
        planes = zip(self._codes, self._scales, strict=True)
        dense = tuple(Dense(signs.matrix(self._format, codes, scale)) for codes, scale in planes)
        shape = dense[0].shape
        return Terms(shape, (Columns.of(self._order, (Terms(shape, dense),)),))


def residual(values: Tensor) -> tuple[Tensor, Tensor]:
    """a1 and a2 of each row of ``values`` (rows, columns)."""
    magnitude = values.double().abs()
    first = magnitude.mean(1)
    return first, (magnitude - first[:, None]).abs().mean(1)


def split(values: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """m and d of each row of ``values`` (rows, columns): those of the best of ``points`` thresholds."""
    magnitude = values.double().abs()
    least = torch.full((len(values),), torch.inf, dtype=torch.float64)
    middle, apart = magnitude.mean(1), torch.zeros_like(least)
    for point in range(1, points + 1):
        below = magnitude <= magnitude.amax(1, keepdim=True) * point / (points + 1)
        small = (magnitude * below).sum(1) / below.sum(1).clamp_min(1)
        large = (magnitude * ~below).sum(1) / (~below).sum(1).clamp_min(1)
        lost = (magnitude - torch.where(below, small[:, None], large[:, None])).square().sum(1)
        better = (lost < least) & below.any(1) & ~below.all(1)
        least = torch.where(better, lost, least)
        middle = torch.where(better, (large + small) / 2, middle)
        apart = torch.where(better, (large - small) / 2, apart)
    return middle, apart


def parts(format: Format, shape: tuple[int, int], **options: float) -> Parts:
    """Both matrices, and the order of the columns."""
    return Parts(((format, shape), (format, shape)), index_dtype(shape[1]).itemsize * shape[1])
