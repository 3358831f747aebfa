# SPDX-License-Identifier: Apache-2.0
r"""Error feedback: columns are rounded one after another, each taking up what the earlier ones lost.

To minimise ``tr((W - Q) H (W - Q)^T)`` with ``H = E[x x^T] + damping``, write ``H = N diag(d) N^T`` with N upper
triangular and ones on its diagonal. Then with the errors ``E = W - Q``::

    tr(E H E^T) = sum_k d_k |(E N)_k|^2,     (E N)_k = w_k + sum_{j<k} E_j N_jk  -  q_k

so the greedy choice is to round ``w_k + sum_{j<k} E_j N_jk`` column by column. That is GPTQ: its updates of all
remaining columns by rows of the inverse's Cholesky factor give column k the very same value when its turn comes; Chee
et al. 2023, arXiv:2307.13304, prove it. This form needs no inverse, writes each batch once, and never accumulates
updates.

Once all columns have values, each can be chosen again with the others as they are: coordinate descent, which QuantEase
(Behdin et al. 2023, arXiv:2309.01885) runs instead. With the other errors fixed, column k costs least at ::

    q_k + (E H)_k / H_kk

The rounding is a function of the caller's, so any format and any codebook can sit in the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.errors import InputError, SpecError

MOST_DAMPING = 1.0
"""The retry ladder ends here: at 1 the damping equals the mean of the second moment's diagonal."""


@dataclass(frozen=True, eq=False)
class Feedback:
    """What the second moment says about how errors pass on.

    * ``order``: (columns,) int64, the column rounded at each step.
    * ``coefficients``: (columns, columns) float32, N above: unit upper triangular, rows and columns in ``order``.
    * ``pivots``: (columns,) float32, d above, in ``order``: 1 / d_k is the squared k-th diagonal entry of the upper
      Cholesky factor of the inverse.
    * ``damping``: the fraction of the mean diagonal that was added, after retries.
    * ``dead``: (columns,) bool, inputs that were always zero: rounded plainly, and no error passes through them.
    """

    order: Tensor
    coefficients: Tensor
    pivots: Tensor
    damping: float
    dead: Tensor

    def raised(self, asked: float) -> str:
        """In words, that the damping is not the one ``asked`` for; empty where it is."""
        return f"damping raised from {asked:g} to {self.damping:g}" if self.damping != asked else ""


Within = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""``(first, current, before, upper, lost)``: round columns from ``first`` on, in order, as :func:`sweep`
does. ``current``, ``before`` and the result ``lost`` are (columns, rows), ``upper`` is (columns, columns)."""


def factorize(moment: Tensor, damping: float, by_activity: bool = False) -> Feedback:
    """Prepare error feedback for inputs with ``moment`` = E[x x^T], (columns, columns).

    Args:
        moment: symmetric; summed in float32, factored here in float64.
        damping: this fraction of the mean diagonal of the live inputs is added to the diagonal. When the matrix is not
            positive definite beyond the rounding of its float32 sums, ten times as much is tried, up to 1.
        by_activity: round the columns of largest E[x^2] first (GPTQ's act-order); equal ones keep their order.

    Raises:
        SpecError: damping is not in 0 .. 1.
        InputError: no damping up to 1 makes the matrix positive definite: it is no second moment.
    """
    if not 0 <= damping <= MOST_DAMPING:
        raise SpecError(f"damping {damping}", "it must lie between 0 and 1", "0.01 is usual")
    columns = moment.shape[0]
    diagonal = moment.diagonal().double()
    dead = diagonal == 0
    live = max(1, int((~dead).sum()))
    mean = float(diagonal.sum()) / live
    order = torch.argsort(diagonal, descending=True, stable=True) if by_activity else torch.arange(columns)
    last_first = order.flip(0)
    matrix = moment.index_select(0, last_first).index_select(1, last_first).double()
    silent = dead[last_first]
    if silent.any():
        matrix[silent], matrix[:, silent] = 0, 0
        matrix.diagonal()[silent] = mean or 1.0
    noise = columns * torch.finfo(torch.float32).eps * mean
    for fraction in _ladder(damping):
        factors = _unit_upper(matrix, fraction * mean, noise)
        if factors is not None:
            return Feedback(order, *factors, fraction, dead)
    raise InputError(
        f"error feedback from a second moment of {columns} inputs",
        f"it is not positive definite, even with {MOST_DAMPING:.0%} damping",
        "collect E[x x^T] of real inputs in float32 or wider",
    )


def _ladder(damping: float) -> list[float]:
    """Dampings to try: the one asked for, then tenfold steps up to the bound."""
    tries = [damping]
    while tries[-1] < MOST_DAMPING:
        tries.append(min(MOST_DAMPING, max(tries[-1] * 10, 1e-3)))
    return tries


def _unit_upper(backwards: Tensor, added: float, noise: float) -> tuple[Tensor, Tensor] | None:
    """N and d of ``matrix + added I = N diag(d) N^T`` as float32; None if a d is not above ``added / 2 + noise``.

    The factorization with the upper triangle on the left is the Cholesky one of the matrix read ``backwards``. Every
    pivot of a positive semi-definite matrix is at least ``added``, so a smaller one means that rounding has taken over.
    """
    damped = backwards.clone()
    damped.diagonal().add_(added)
    factor, info = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal().square()
    if int(info) != 0 or not bool((pivots > added / 2 + noise).all()):
        return None
    unit: Tensor = factor.div_(factor.diagonal().clone()).float().flip(0, 1)
    return unit, pivots.float().flip(0)


def sweep(
    weight: Tensor,
    feedback: Feedback,
    round: Callable[[int, Tensor], Tensor],
    batch: int = 128,
    enter: Callable[[int, Tensor], None] | None = None,
    span: int = 0,
) -> None:
    """Round all columns of ``weight`` in turn; the caller's functions keep what they chose.

    Args:
        weight: float32 (rows, columns).
        feedback: from :func:`factorize`.
        round: ``(column, values (rows,)) -> chosen (rows,)``: the values to put in place of the compensated ``values``.
        batch: columns between products with all earlier errors; changes speed and, in the last bits, rounding.
        enter: ``(first column, values (rows, <= span))``, called before the columns of each span are rounded, with the
            weights compensated for everything rounded before. Needs the natural order and ``span`` columns a span.
        span: see ``enter``.
    """
    original = weight.T[feedback.order].contiguous()
    _columns(original, original, feedback, feedback.coefficients, round, batch, enter, span)


def sweep_by_batches(weight: Tensor, feedback: Feedback, within: Within, batch: int = 128) -> Tensor:
    """:func:`sweep` with ``within``, which rounds all columns of a batch. Returns what the errors of each row (rows,)
    cost with the damped matrix, ``sum_k d_k (E N)_k^2``: no less than with the second moment itself, but for rounding.
    """
    upper, original = feedback.coefficients, weight.T[feedback.order].contiguous()
    errors, cost = torch.empty_like(original), torch.zeros(original.shape[1])
    for first in range(0, len(original), batch):
        here = slice(first, first + batch)
        current = torch.addmm(original[here], upper[:first, here].T, errors[:first])
        passed = current - original[here]
        within(first, current, original[here], upper[here, here], errors[here])
        passed.addmm_(upper[here, here].T, errors[here])
        cost += feedback.pivots[here] @ passed.square_()
    return cost


def damped(moment: Tensor, feedback: Feedback) -> Tensor:
    """The matrix that :func:`factorize` made ``feedback`` of, float32 (columns, columns), columns where they were."""
    matrix, dead = moment.float().clone(), feedback.dead
    mean = float(matrix.diagonal().sum(dtype=torch.float64)) / max(1, int((~dead).sum()))
    matrix[dead], matrix[:, dead] = 0, 0
    matrix.diagonal()[dead] = mean or 1.0
    matrix.diagonal().add_(feedback.damping * mean)
    return matrix


def descend(
    weight: Tensor,
    chosen: Tensor,
    moment: Tensor,
    feedback: Feedback,
    round: Callable[[int, Tensor], Tensor],
    batch: int = 128,
) -> None:
    """Round all columns again, in the order of ``feedback``, each where it costs least beside the others as they are.

    Where ``round`` takes the nearest of all values that it may, no column costs more after its turn.

    Args:
        weight, chosen: float32 (rows, columns), and what stands for it now.
        moment: from :func:`damped`.
        round, batch: see :func:`sweep`.
    """
    order, pivots = feedback.order, moment.diagonal()
    asked = chosen + (weight - chosen) @ moment / pivots
    between = (moment / pivots)[order][:, order]
    _columns(asked.T[order].contiguous(), chosen.T[order].contiguous(), feedback, between, round, batch)


def _columns(
    original: Tensor,
    before: Tensor,
    feedback: Feedback,
    upper: Tensor,
    round: Callable[[int, Tensor], Tensor],
    batch: int,
    enter: Callable[[int, Tensor], None] | None = None,
    span: int = 0,
) -> None:
    """Round ``original_k + sum_{j<k} upper_jk (before_j - chosen_j)`` for every column k, (columns, rows) in order."""
    columns, order = len(original), feedback.order.tolist()
    errors = torch.empty_like(original)
    wanted, lost = before.unbind(), errors.unbind()
    if enter is not None:
        batch = span * max(1, batch // span)
    for first in range(0, columns, batch):
        last = min(first + batch, columns)
        current = torch.addmm(original[first:last], upper[:first, first:last].T, errors[:first])
        now = current.unbind()
        for k in range(first, last):
            here = k - first
            if enter is not None and k % span == 0:
                stop = min(k + span, columns)
                enter(k, _compensated(original[k:stop], current[here : here + span], upper[k:stop, k:stop]).T)
            torch.sub(wanted[k], round(order[k], now[here]), out=lost[k])
            if k + 1 < last:
                current[here + 1 :].addr_(upper[k, k + 1 : last], lost[k])


def _compensated(original: Tensor, current: Tensor, upper: Tensor) -> Tensor:
    """Weights (columns, rows) of a span that best make up for all earlier errors, were they not rounded themselves.

    ``current - original`` is what the earlier errors ask of each column alone; what one column takes up, the later ones
    need not, hence the triangular solve with the span's own part of N.
    """
    asked = current - original
    taken: Tensor = torch.linalg.solve_triangular(upper.T, asked, upper=False, unitriangular=True)
    return original + taken
