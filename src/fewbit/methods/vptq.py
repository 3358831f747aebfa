# SPDX-License-Identifier: Apache-2.0
r"""VPTQ: vectors of a codebook for the weights of a column, chosen column by column with error feedback.

Liu et al. 2024, arXiv:2409.17066 (github.com/microsoft/VPTQ), for formats whose codes stand for several neighbours of a
column. All weights of such a vector meet the same input, so the Hessian weighs them alike: the nearest vector is the
best one, and k-means with the weights E[x_k^2] is the right start (its diagonal alone). In order:

1. the first book by k-means++ of all vectors, weighted by E[x^2] of their columns; the best of some restarts;
2. a sweep over the columns with error feedback (:mod:`fewbit.methods.feedback`), each vector to its nearest;
3. with a residual book: k-means of what that sweep left of its vectors, and a second sweep to sums of two;
4. rounds of: books of least ``tr(E H E^T)`` under the codes (a linear least squares problem, by conjugate gradients),
   then every column again, by coordinate descent.

With ``outliers``, that share of the columns, those of largest E[x^2], has shorter vectors and a book of its own. All
columns are swept and chosen again as one weight, these first; the least squares are of all books at once. The result is
the two matrices side by side, with the order of the columns.

Where we depart from the paper: 4 is ours (theirs tunes books on data only; see the tuning ``books``); sums of two are
searched among the ``beam`` nearest first vectors instead of after the nearest alone; the order of the columns is that
of act-order but none is moved except outliers, as columns share books; no column has a scale or a bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import clusters, float16, given
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Terms, foremost, index_dtype
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import codebooks as K
from fewbit.methods import feedback, norms, objective
from fewbit.methods.norms import Norms, lost

STEPS = 8
"""Of conjugate gradients, from the books there are."""
LEAST_GAIN = 1e-3
"""A round that lowers the loss by a smaller share is the last."""


def refuse(format: Format) -> str | None:
    """None, or why codes of ``format`` are not vectors down a column."""
    return None if format.height > 1 else "its codes do not stand for several weights of a column"


@exact()
def vptq(
    weight: Tensor,
    format: Format,
    facts: Facts,
    *,
    damp_percent: float = 0.01,
    block_size: int = 128,
    restarts: int = 2,
    rounds: int = 6,
    beam: int = 8,
    never_worse: bool = True,
    outliers: float = 0.0,
    outlier_length: int = 2,
    outlier_bits: int = 6,
    outlier_residual_bits: int = 0,
    norm: str = "none",
) -> QTensor | Terms:
    """Quantize ``weight`` (rows, columns) to vectors of codebooks fitted to it.

    Args:
        weight: float, (rows, columns).
        format: of vectors down a column, such as ``vector4x8``.
        facts: of the inputs, with their second moment. When no token was seen the result is rounding to nearest.
        damp_percent: fraction of the mean diagonal added to the second moment; raised tenfold when that is too little.
        block_size: columns between products with all earlier errors.
        restarts: starts of k-means, of which the best is kept.
        rounds: most rounds of books and codes; 0 leaves what the sweeps chose.
        beam: first vectors tried for a sum of two; 1 is the paper's greedy choice.
        never_worse: round all to nearest, with the books that the sweeps began with, where that loses less.
        outliers: share of the columns, those of largest E[x^2] (the first, without any token), that have a book of
            their own; at least one column where it is above 0.
        outlier_length, outlier_bits, outlier_residual_bits: weights of their vectors, and bits of an index into that
            book and into a residual one; 0 for no such.
        norm: scales stored beside, of "rows", "columns", "both" or "none"; E[x^2] is then of inputs times the columns'.

    Returns:
        One matrix; or with outliers, columns in an order, these first; with a norm, either of them under scales.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no second moment).
        SpecError: an option is out of range. UnsupportedError: codes of ``format`` are no vectors down a column.
    """
    _check(weight, format, facts, block_size=block_size, restarts=restarts, rounds=rounds, beam=beam)
    sides = _sides(format, weight.shape, outliers, outlier_length, outlier_bits, outlier_residual_bits)
    scales = Norms.of(weight, norm)
    shown, seen = scales.without(weight), scales.facts(facts)
    order = _order(seen, sides[0][1]) if len(sides) > 1 else None
    now = slice(None) if order is None else order
    if not facts.tokens:
        return scales.over(_whole([QTensor.rounded(side, part) for part, side in _split(shown[:, now], sides)], order))
    second = seen.second_moment[now][:, now]
    passing = feedback.factorize(second, damp_percent, by_activity=True)
    task = _Task(_padded(shown[:, now], sides), weight.shape[0], sides, passing, block_size, beam, scales.worth)
    start = _swept(task, seen.mean_square[now], restarts)
    found = _improved(task, start, feedback.damped(second, passing), rounds)
    solved = scales.refitted(weight, _whole(task.stored(found, passing.raised(damp_percent)), order), facts)
    if not never_worse:
        return solved
    plain = scales.over(_whole(task.stored(task.nearest(start)), order))
    return plain if lost(weight, plain, facts) < lost(weight, solved, facts) else solved


def parts(
    format: Format,
    shape: tuple[int, int],
    *,
    outliers: float,
    outlier_length: int,
    outlier_bits: int,
    outlier_residual_bits: int,
    norm: str,
    **other: Any,
) -> Parts:
    """The columns with a book of their own, the others, and the order of all; or one matrix, where there are no such.
    Scales in either case.

    Raises:
        SpecError: no share of columns, no such vectors or scales, or a book larger than what it is for.
    """
    sides = _sides(format, shape, outliers, outlier_length, outlier_bits, outlier_residual_bits)
    order = index_dtype(shape[1]).itemsize * shape[1] if len(sides) > 1 else 0
    return Parts(tuple((side, (shape[0], columns)) for side, columns in sides), order + norms.nbytes(norm, shape))


Formats = tuple[tuple[Format, int], ...]
"""Of matrices side by side, each with how many columns are its own."""


def _sides(format: Format, shape: Sequence[int], outliers: float, length: int, bits: int, residual: int) -> Formats:
    """Of the outliers, where there are any, and of the others."""
    (rows, columns), asked = shape, f"vptq with outliers={outliers!r}"
    if not (given.number(outliers) and 0 <= outliers < 1):
        raise SpecError(asked, "out of range", "a share of the columns below 1, e.g. 0.02, or 0 for none")
    count = min(columns - 1, max(1, round(outliers * columns))) if outliers else 0
    if not count:
        return ((format, columns),)
    named = (("outlier_length", length, 2), ("outlier_bits", bits, 6), ("outlier_residual_bits", residual, 0))
    for name, value, usual in named:
        if type(value) is not int:
            raise SpecError(f"{asked} and {name}={value!r}", "no whole number", f"{usual} would work")
    own = format.vectors_of(length, bits, residual)
    vectors, entries = count * -(-rows // own.height), max(param.entry[0] for param in own.params)
    if vectors < entries:
        found = f"a book of {own.name} has {entries} entries for the {vectors} vectors of {count} columns"
        works = f"outlier_bits={max(1, vectors.bit_length() - 1)} or less, more outliers, or outliers=0 for this layer"
        raise SpecError(f"{asked} of a weight of shape {tuple(shape)}", found, works)
    return ((own, count), (format, columns - count))


def _check(weight: Tensor, format: Format, facts: Facts, **least: int) -> None:
    """Refuse what cannot be quantized so, facts without a second moment, and options that are no counts."""
    objective.check("vptq", weight, format, facts)
    asked = objective.asked("vptq", weight, format)
    if (reason := refuse(format)) is not None:
        raise UnsupportedError(asked, reason, "vectors work, such as vector4x8; gptq takes other formats")
    objective.check_moment("vptq", weight, format, facts, "rtn")
    for name, value in least.items():
        if value < (name != "rounds"):
            raise SpecError(f"{asked} with {name}={value}", "it is too small", "1 is the least, 0 for rounds")


@dataclass(frozen=True, eq=False)
class _Task:
    """``weight``: (rows, columns) in the order in which columns are stored, rows filled up to whole vectors with zeros;
    ``rows``: those that are not filled up; ``worth``: what these count, see :mod:`fewbit.methods.codebooks`."""

    weight: Tensor
    rows: int
    sides: Formats
    passing: feedback.Feedback
    block_size: int
    beam: int
    worth: Tensor | None

    @property
    def filled(self) -> Tensor | None:
        """``worth`` of all rows: those that fill up count nothing. None where all count 1."""
        if self.worth is None and len(self.weight) == self.rows:
            return None
        worth = torch.ones(self.rows) if self.worth is None else self.worth
        return torch.constant_pad_nd(worth, (0, len(self.weight) - self.rows))

    def points(self) -> list[Tensor]:
        """Vectors of each side, (columns, vectors, length)."""
        return [part.T.reshape(part.shape[1], -1, side.height) for part, side in _split(self.weight, self.sides)]

    def choice(self, books: Sequence[tuple[Tensor, ...]], present: K.Sides | None = None) -> K.Beside:
        choices = []
        for i, (side, columns) in enumerate(self.sides):
            shape, width = (columns, len(self.weight)), B.width(columns, side.block)
            before = present[i] if present else None
            choices.append(K.Choice(books[i], shape, width, self.beam, before, self.filled))
        return K.Beside(choices)

    def nearest(self, start: K.Sides) -> K.Sides:
        """All vectors to the nearest, with the books of ``start``."""
        pairs = zip(self.points(), start, strict=True)
        return tuple(K.all_nearest(points, one.books, one.width, self.beam, None, self.filled) for points, one in pairs)

    def stored(self, found: K.Sides, note: str = "") -> list[QTensor]:
        pairs = zip(found, self.sides, strict=True)
        return [replace(one.qtensor(side, self.rows), note=note) for one, (side, _) in pairs]


def _swept(task: _Task, square: Tensor, restarts: int) -> K.Sides:
    """Books by k-means of whole vectors, weighted by ``square``, E[x^2] of (columns,), and codes by a sweep after
    each: first books of all sides, then second ones of those that have them."""
    points: list[Tensor] = task.points()
    books: list[tuple[Tensor, ...]] = [() for _ in points]
    worth = square.split([columns for _, columns in task.sides])
    for stage in range(max(len(side.params) for side, _ in task.sides)):
        for i, (side, columns) in enumerate(task.sides):
            if stage < len(side.params):
                share = worth[i][:, None].repeat(1, points[i].shape[1])
                filled = None if task.worth is None else task.filled
                share *= 1 if filled is None else filled.view(-1, side.height).mean(1)
                share[:, max(1, task.rows // side.height) :] *= clusters.SPARE
                entries, width = side.params[stage].entry[0], B.width(columns, side.block)
                books[i] = (*books[i], K.cluster(points[i], share, entries, width, restarts))
        choice = task.choice(books)
        feedback.sweep(task.weight, task.passing, choice, task.block_size)
        coded = choice.coded()
        seen = [one.seen for one in choice.choices]
        points = [values - one.decode().view(values.shape) for values, one in zip(seen, coded, strict=True)]
    return coded


def _improved(task: _Task, coded: K.Sides, moment: Tensor, rounds: int) -> K.Sides:
    """Rounds of better books under the codes and better codes under the books, as long as they help."""
    wanted = task.weight[: task.rows].T.contiguous()
    least = K.loss(wanted, coded, moment, task.worth)
    for _ in range(rounds):
        before = least
        for again in (False, True):
            if again:
                choice = task.choice([one.books for one in coded], coded)
                feedback.descend(task.weight, K.decoded(coded).T, moment, task.passing, choice, task.block_size)
                found = choice.coded()
            else:
                found = K.refitted(wanted, coded, moment, STEPS, task.worth)
            now = K.loss(wanted, found, moment, task.worth)
            if now < least:
                coded, least = found, now
        if not least < (1 - LEAST_GAIN) * before:
            break
    return coded


def _order(facts: Facts, count: int) -> Tensor:
    """(columns,): the ``count`` columns of largest E[x^2], then the others."""
    return foremost(facts.mean_square if facts.gram is None else facts.gram.diagonal(), count)


def _split(weight: Tensor, sides: Formats) -> list[tuple[Tensor, Format]]:
    """The columns of each side, with its format."""
    found = weight.split([columns for _, columns in sides], 1)
    return [(part, side) for part, (side, _) in zip(found, sides, strict=True)]


def _padded(weight: Tensor, sides: Formats) -> Tensor:
    """``weight`` within float16, its rows filled up to whole vectors of all ``sides``."""
    length = math.lcm(*(side.height for side, _ in sides))
    return torch.constant_pad_nd(weight, (0, 0, 0, -len(weight) % length)).clamp(-float16.LARGEST, float16.LARGEST)


def _whole(found: Sequence[QTensor], order: Tensor | None) -> QTensor | Terms:
    """What was ``found`` for the columns in ``order``, or as they are."""
    if order is None:
        return found[0]
    columns = Columns.of(order, tuple(map(Dense, found)))
    return Terms(columns.shape, (columns,))
