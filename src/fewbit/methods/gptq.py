# SPDX-License-Identifier: Apache-2.0
"""GPTQ: column after column to the nearest value, each error passed on to the columns that can make up for it.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, with act-order and static groups as in their code
(github.com/IST-DASLab/gptq). Where we depart from it:

* the same values come from a factorization without an inverse (see :mod:`fewbit.methods.feedback`);
* inputs that were always zero keep their plainly rounded weights instead of zeros;
* parameters start from the clipping search unless ``clip=False``;
* a row that ends worse than plain rounding with the same starting parameters is plainly rounded, so that the
  objective is never worse than where it started from.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format, Params
from fewbit.core.qtensor import QTensor
from fewbit.errors import SpecError
from fewbit.methods import feedback, grids, objective, ranges

ROUNDING = 1e-3
"""How much more than it says a row may cost that was summed up in float32."""


@exact()
def gptq(
    weight: Tensor,
    format: Format,
    facts: Facts,
    *,
    damp_percent: float = 0.01,
    desc_act: bool = True,
    static_groups: bool = True,
    block_size: int = 128,
    clip: bool = True,
    steps: int = 24,
    floor: float = 0.4,
    never_worse: bool = True,
) -> QTensor:
    """Quantize ``weight`` with error feedback. Where the damping was raised, the result's note says so.

    Args:
        weight: float, (rows, columns).
        format: any format whose codes stand for one weight each.
        facts: of the inputs, with their second moment. When no token was seen the result is rounding to nearest.
        damp_percent: fraction of the mean diagonal added to the second moment; raised tenfold when that is too little.
        desc_act: round the columns of largest E[x^2] first. Codes come back in the original order.
        static_groups: fix all parameters from the original weight; otherwise fit each span when its turn comes.
        block_size: columns between products with all earlier errors.
        clip: choose parameters by the clipping search weighted by E[x^2] (``steps`` ratios down to ``floor``).
        steps, floor: see :func:`fewbit.methods.clip.clip`.
        never_worse: round rows plainly that end worse so; False is the paper's algorithm to the letter.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no second moment).
        SpecError: an option is out of range, or ``desc_act`` without ``static_groups`` where spans are narrower than
            a row.
        UnsupportedError: a code of ``format`` stands for several weights.
    """
    ratios = ranges.grid(steps, floor) if clip else ()
    _check(weight, format, facts, block_size)
    agrees(format, weight.shape[1], desc_act=desc_act, static_groups=static_groups)
    weight = weight.float()
    bound = format.bind(weight)
    if not facts.tokens:
        return QTensor.rounded(bound, weight)
    passing = _passing(facts, damp_percent, desc_act)
    worth = facts.mean_square
    start = ranges.search(bound, weight, worth, ratios)
    if static_groups or _span(format, weight.shape[1]) >= weight.shape[1]:
        result, most = _swept(weight, bound, passing, start, block_size)
    else:
        columns = _Columns(bound, weight.shape, start)

        def refit(first: int, values: Tensor) -> None:
            columns.refit(first, ranges.search(bound, values, worth[first : first + values.shape[1]], ratios))

        feedback.sweep(weight, passing, columns.round, block_size, refit, _span(format, weight.shape[1]))
        result, most = columns.qtensor(), _unknown(weight)
    if never_worse:
        result = _better_rows(weight, facts, result, start, most)
    return replace(result, note=passing.raised(damp_percent))


def _passing(facts: Facts, damping: float, by_activity: bool) -> feedback.Feedback:
    """How errors pass on, once for all layers with these facts."""
    key = "feedback", damping, by_activity
    return facts.once(key, lambda: feedback.factorize(facts.second_moment, damping, by_activity))


def _swept(
    weight: Tensor, format: Format, passing: feedback.Feedback, params: Params, block_size: int
) -> tuple[QTensor, Tensor]:
    """``weight`` rounded with error feedback, parameters being fixed; and what each row loses at most, if that is known
    (else infinite)."""
    compiled = grids.Columns.of(format, weight.shape, params, passing)
    if compiled is not None:
        most = feedback.sweep_by_batches(weight, passing, compiled.round, block_size)
        return compiled.qtensor(), most
    columns = _Columns(format, weight.shape, params)
    feedback.sweep(weight, passing, columns.round, block_size)
    return columns.qtensor(), _unknown(weight)


def _unknown(weight: Tensor) -> Tensor:
    return torch.full((len(weight),), torch.inf)


def _check(weight: Tensor, format: Format, facts: Facts, block_size: int) -> None:
    """Refuse what cannot be quantized so."""
    objective.check("gptq", weight, format, facts)
    objective.check_scalar("gptq", format)
    objective.check_moment("gptq", weight, format, facts, "clip")
    if block_size < 1:
        asked = objective.asked("gptq", weight, format)
        raise SpecError(f"{asked} with block_size={block_size}", "it must be positive", "128 is usual")


def agrees(format: Format, columns: int, *, desc_act: bool, static_groups: bool, **others: float | bool) -> None:
    """Refuse groups that are fitted when their turn comes where their columns have no turn in common.

    Raises:
        SpecError: ``desc_act`` without ``static_groups`` where spans are narrower than a row.
    """
    if desc_act and not static_groups and _span(format, columns) < columns:
        raise SpecError(
            f"gptq of rows of {columns} columns to {format.name} with desc_act and without static_groups",
            "parameters fitted in the order of activity belong to columns that lie apart, which no layout here stores",
            "static_groups=True, or desc_act=False, or a format with one scale a row",
        )


def _span(format: Format, columns: int) -> int:
    """Columns whose parameters are fitted together."""
    return columns if format.fit_block == 0 or format.block == 0 else format.fit_block


class _Columns:
    """Codes and parameters in the making, one column at a time, by nothing but the format's own encode and decode."""

    def __init__(self, format: Format, shape: torch.Size, params: Params) -> None:
        rows, columns = shape
        self._format, self._width = format, B.width(columns, format.block)
        self._codes = torch.empty(columns, rows, dtype=F.code_dtype(format))
        # One contiguous (rows, 1, 1) slice a block: columns lie in rows here, and a step reads one entry a row.
        # A copy always: the transpose of one row is contiguous as it is, and refits write here.
        self._params = {
            name: values.transpose(0, 1).clone(memory_format=torch.contiguous_format) for name, values in params.items()
        }
        self._at = [self._slice(block) for block in range(B.count(columns, format.block))]
        self._column = self._codes.unbind()

    def _slice(self, block: int) -> Params:
        return self._format.working({name: values[block].unsqueeze(1) for name, values in self._params.items()})

    def round(self, column: int, values: Tensor) -> Tensor:
        codes, chosen = self._format.nearest(values.view(-1, 1, 1), self._at[column // self._width])
        self._column[column].copy_(codes.view(-1))
        return chosen.view(-1)

    def refit(self, first: int, params: Params) -> None:
        """Replace the parameters of the blocks from column ``first`` on: ``params`` are (rows, blocks, 1)."""
        block = first // self._width
        for name, values in params.items():
            self._params[name][block : block + values.shape[1]] = values.transpose(0, 1)
        for refitted in range(block, block + next(iter(params.values())).shape[1]):
            self._at[refitted] = self._slice(refitted)

    def qtensor(self) -> QTensor:
        params = {name: values.transpose(0, 1).contiguous() for name, values in self._params.items()}
        return QTensor.of(self._format, self._codes.T.contiguous(), params)


def _better_rows(weight: Tensor, facts: Facts, solved: QTensor, params: Params, most: Tensor) -> QTensor:
    """Rows of ``solved``, but those of plain rounding with ``params`` where the objective is less there. Only rows of
    which ``most`` does not say so are looked at."""
    start = QTensor.nearest(solved.format, weight, params)
    plain = objective.row_errors(weight - start.dequantize(), facts)
    worse = most * (1 + ROUNDING) > plain
    if worse.any():
        lost = objective.row_errors((weight - solved.dequantize())[worse], facts)
        worse[worse.clone()] = lost > plain[worse]
    if not worse.any():
        return solved
    codes = torch.where(worse.unsqueeze(-1), start.packed, solved.packed)
    params = {n: torch.where(worse.view(-1, *[1] * (v.ndim - 1)), start.params[n], v) for n, v in solved.params.items()}
    return QTensor.of(solved.format, codes, params)
