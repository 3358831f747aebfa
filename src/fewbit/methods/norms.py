# SPDX-License-Identifier: Apache-2.0
r"""Scales of rows and of columns that a weight is quantized without, and stored beside: ``enable_norm`` of VPTQ.

Liu et al. 2024, arXiv:2409.17066 (github.com/microsoft/VPTQ), whose scales are standard deviations. With r of rows and
c of columns, root mean squares in float16::

    W = diag(r) V diag(c),     x' = x c,     E[x' x'^T] = diag(c) E[x x^T] diag(c)

V is what codes are chosen for, by the second moment of x', and row i of it counts r_i^2: what is minimised is the error
of W still (the authors' code leaves the second moment as it was, and rows alike). Under the codes, scales have best
values::

    r_i = (W G P^T)_ii / (P G P^T)_ii,                 P = V_hat diag(c),    G = E[x x^T]
    (P^T P * G) c = diag(P^T W G),                     P = diag(r) V_hat,    * entry by entry

A row or column of zeros has the scale 1. No bias: columns of weights have means next to zero (figures in
``docs/methods/vptq.md``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.core import float16
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor
from fewbit.core.rewrite import Scale
from fewbit.core.terms import Dense, Terms
from fewbit.errors import SpecError
from fewbit.methods import objective

KINDS = ("none", "rows", "columns", "both")
LEAST = 2.0**-14
"""The least normal float16."""
RIDGE = 1e-6
"""Of the mean diagonal, added to the equations of the columns: those without input keep their scale."""


@dataclass(frozen=True, eq=False)
class Norms:
    """``rows`` (rows,) and ``columns`` (columns,), float16 and positive where they are fitted, or None for ones."""

    rows: Tensor | None
    columns: Tensor | None

    @staticmethod
    def of(weight: Tensor, kind: str) -> Norms:
        """Of what is spelt ``kind``: rows first, columns of what these leave.

        Raises:
            SpecError: there are no such.
        """
        _check(kind)
        rows = _size(weight, 1) if kind in ("rows", "both") else None
        left = weight if rows is None else weight / rows.float()[:, None]
        return Norms(rows, _size(left, 0) if kind in ("columns", "both") else None)

    def without(self, weight: Tensor) -> Tensor:
        """V of ``weight`` (rows, columns)."""
        weight = weight.float() if self.rows is None else weight.float() / self.rows.float()[:, None]
        return weight if self.columns is None else Scale(self.columns).weight(weight)

    @property
    def worth(self) -> Tensor | None:
        """What the square of an error of V counts in each row, (rows,)."""
        return None if self.rows is None else self.rows.float().square()

    def facts(self, facts: Facts) -> Facts:
        """Of the inputs that V meets."""
        return facts if self.columns is None else Scale(self.columns).facts(facts)

    def over(self, made: QTensor | Terms) -> QTensor | Terms:
        """``made`` for V, under these scales."""
        if self.rows is None and self.columns is None:
            return made
        terms = (Dense(made),) if isinstance(made, QTensor) else made.terms
        return Terms(made.shape, terms, self.rows, self.columns)

    def refitted(self, weight: Tensor, made: QTensor | Terms, facts: Facts) -> QTensor | Terms:
        """``made`` for V under the best of scales, rows first; those that lose no less than before stay."""
        best, found, values = self, self.over(made), made.dequantize()
        least = lost(weight, found, facts)
        for name in ("rows", "columns"):
            if getattr(best, name) is None:
                continue
            tried = best._rows(weight, values, facts) if name == "rows" else best._columns(weight, values, facts)
            if (now := lost(weight, tried.over(made), facts)) < least:
                best, found, least = tried, tried.over(made), now
        return found

    def _rows(self, weight: Tensor, values: Tensor, facts: Facts) -> Norms:
        shown = values.double() if self.columns is None else values.double() * self.columns
        pulled, moment = shown @ facts.second_moment.double(), weight.double()
        across, own = (pulled * moment).sum(1), (pulled * shown).sum(1)
        assert self.rows is not None
        return replace(self, rows=float16.of(torch.where(own > 0, across / own, self.rows.double())))

    def _columns(self, weight: Tensor, values: Tensor, facts: Facts) -> Norms:
        shown = values.double() if self.rows is None else values.double() * self.rows[:, None]
        assert self.columns is not None
        second, before = facts.second_moment.double(), self.columns.double()
        matrix = (shown.T @ shown) * second
        rest = (shown * ((weight.double() - shown * before) @ second)).sum(0)
        matrix.diagonal().add_(RIDGE * float(matrix.diagonal().mean()) or 1.0)
        return replace(self, columns=float16.of(before + torch.linalg.solve(matrix, rest)))


def nbytes(kind: str, shape: tuple[int, int]) -> int:
    """What scales of ``kind`` take for a weight of ``shape``.

    Raises:
        SpecError: there are no such.
    """
    _check(kind)
    return 2 * (shape[0] * (kind in ("rows", "both")) + shape[1] * (kind in ("columns", "both")))


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise SpecError(f"vptq with norm={kind!r}", "no such scales", f"norms are {', '.join(KINDS)}")


def lost(weight: Tensor, made: QTensor | Terms, facts: Facts) -> float:
    """What ``made`` for ``weight`` costs at the output."""
    return float(objective.row_errors(weight.float() - made.dequantize(), facts).sum())


def _size(weight: Tensor, axis: int) -> Tensor:
    """Root mean squares along ``axis``, as they are stored."""
    size = weight.double().square().mean(axis).sqrt()
    return torch.where(size > 0, size.clamp(LEAST, float16.LARGEST), 1.0).to(torch.float16)
