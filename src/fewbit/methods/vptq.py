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

Where we depart from the paper: 4 is ours (theirs tunes books on data only; see the tuning ``books``); sums of two are
searched among the ``beam`` nearest first vectors instead of after the nearest alone; the order of the columns is that
of act-order but none is moved, as columns share books; no column has a scale, a bias or a book for outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.methods import codebooks as K
from fewbit.methods import feedback, objective

STEPS = 8
"""Of conjugate gradients, from the books there are."""
LEAST_GAIN = 1e-3
"""A round that lowers the loss by a smaller share is the last."""


def refuse(format: Format) -> str | None:
    """None, or why codes of ``format`` are not vectors down a column."""
    return None if format.height > 1 else "its codes do not stand for several weights of a column"


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
) -> QTensor:
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

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no second moment).
        SpecError: an option is out of range.
        UnsupportedError: codes of ``format`` are no vectors down a column.
    """
    _check(weight, format, facts, block_size=block_size, restarts=restarts, rounds=rounds, beam=beam)
    if not facts.tokens:
        params = F.fit(format, weight)
        return QTensor.of(format, F.encode(format, weight, params), params, len(weight))
    rows = len(weight)
    high = torch.constant_pad_nd(weight.float(), (0, 0, 0, -rows % format.height)).clamp(-K.LARGEST, K.LARGEST)
    passing = feedback.factorize(facts.second_moment, damp_percent, by_activity=True)
    moment = feedback.damped(facts.second_moment, passing)
    start = _swept(high, rows, format, facts, passing, block_size, restarts, beam)
    solved = _improved(high, start, moment, passing, block_size, rounds, beam).qtensor(format, rows)
    if not never_worse:
        return solved
    points = high.T.reshape(len(start.indices[0]), -1, format.height)
    plain = K.all_nearest(points, start.books, start.width, beam).qtensor(format, rows)
    return plain if _lost(weight, plain, facts) < _lost(weight, solved, facts) else solved


def _check(weight: Tensor, format: Format, facts: Facts, **least: int) -> None:
    """Refuse what cannot be quantized so, facts without a second moment, and options that are no counts."""
    objective.check("vptq", weight, format, facts)
    asked = f"vptq of a weight of shape {tuple(weight.shape)} to {format.name}"
    if (reason := refuse(format)) is not None:
        raise UnsupportedError(asked, reason, "vectors work, such as vector4x8; gptq takes other formats")
    if facts.tokens and facts.gram is None:
        raise InputError(asked, "the facts hold no second moment", "collect them with gram=True, or use method rtn")
    for name, value in least.items():
        if value < (name != "rounds"):
            raise SpecError(f"{asked} with {name}={value}", "it is too small", "1 is the least, 0 for rounds")


def _swept(
    weight: Tensor,
    rows: int,
    format: Format,
    facts: Facts,
    passing: feedback.Feedback,
    block_size: int,
    restarts: int,
    beam: int,
) -> K.Coded:
    """Books by weighted k-means of whole vectors, ``rows`` being no padding, and codes by a sweep after each."""
    columns, width = weight.shape[1], B.width(weight.shape[1], format.block)
    points = weight.T.reshape(columns, -1, format.height)
    worth = facts.mean_square[:, None].repeat(1, points.shape[1])
    worth[:, max(1, rows // format.height) :] = 0
    books: tuple[Tensor, ...] = ()
    for param in format.params:
        books = (*books, K.cluster(points, worth, param.entry[0], width, restarts))
        choice = K.Choice(books, (columns, len(weight)), width, beam)
        feedback.sweep(weight, passing, choice, block_size)
        coded = choice.coded()
        points = choice.seen - coded.decode().view(points.shape)
    return coded


def _improved(
    weight: Tensor, coded: K.Coded, moment: Tensor, passing: feedback.Feedback, block_size: int, rounds: int, beam: int
) -> K.Coded:
    """Rounds of better books under the codes and better codes under the books, as long as they help."""
    wanted = weight.T.contiguous()
    least = K.loss(wanted, coded, moment)
    for _ in range(rounds):
        before = least
        for again in (False, True):
            if again:
                choice = K.Choice(coded.books, (weight.shape[1], len(weight)), coded.width, beam, coded)
                feedback.descend(weight, coded.decode().T, moment, passing, choice, block_size)
                found = choice.coded()
            else:
                found = K.refitted(wanted, coded, moment, STEPS)
            lost = K.loss(wanted, found, moment)
            if lost < least:
                coded, least = found, lost
        if not least < (1 - LEAST_GAIN) * before:
            break
    return coded


def _lost(weight: Tensor, values: QTensor, facts: Facts) -> float:
    return float(objective.row_errors(weight.float() - values.dequantize(), facts).sum())
