# SPDX-License-Identifier: Apache-2.0
"""AWQ's clip search: rounding to nearest of weights that were cut off where it helps the output of their group.

Lin et al. 2023, arXiv:2306.00978, ``auto_clip`` of github.com/mit-han-lab/llm-awq: every group's weights are cut to
``+-ratio max|w|`` for a grid of ratios, rounded, and the ratio of least ``E (sum_{i in group} (w_i - w_hat_i) x_i)^2``
is kept. That is ``d G d^T`` with d the group's errors and G its part of E[x x^T]: what :mod:`fewbit.methods.clip` does,
with the correlations inside of a group. Those between groups are left to methods with error feedback. Where we depart:

* G is of the whole calibration; they take 512 tokens;
* they leave query and key projections out, whose outputs are multiplied with one another; a recipe can say so by giving
  these layers method ``rtn``;
* ratios are evenly spaced from 1 to ``floor`` with both ends.

The other half of AWQ, the scale search, is the transform of that name; it comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.methods import objective, ranges


def refuse(format: Format) -> str | None:
    """None, or why codes of ``format`` cannot be chosen by cutting groups off."""
    if format.best_fit or format.plain is not None or format.whole:
        what = "tables" if format.best_fit else "scales"
        return f"its {what} are fitted to many groups at once, of which none has a range of its own"
    return objective.refuse_vectors(format)


@exact()
def awq(weight: Tensor, format: Format, facts: Facts, *, steps: int = 20, floor: float = 0.5) -> QTensor:
    """Quantize ``weight`` (rows, columns) to nearest after cutting every group off where its output loses least.

    Args:
        weight: float, (rows, columns).
        format: any format whose codes stand for one weight each.
        facts: of the inputs, with their second moment; when no token was seen all inputs count the same.
        steps: ratios tried, from 1 down to ``floor``; 1 is plain rounding and wins ties.
        floor: the smallest ratio.

    Returns:
        A QTensor whose groups each have an output error of at most that of rounding to nearest. A group is what is
        fitted together: a span.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no second moment).
        SpecError: ``steps`` or ``floor`` out of range.
        UnsupportedError: a code of ``format`` stands for several weights, or its tables are those of many groups.
    """
    ratios = ranges.grid(steps, floor)
    objective.check("awq", weight, format, facts)
    reason = refuse(format)
    if reason is not None:
        raise UnsupportedError(f"awq to {format.name}", reason, "method rtn takes any format, clip weighs tables")
    objective.check_moment("awq", weight, format, facts, "clip")
    weight = weight.float()
    format = format.bind(weight)
    moments = diagonal_blocks(facts.second_moment, format.fit_block if format.block else 0)
    mask = B.present(weight.shape[1], format.block)
    params = ranges.by_strips(format, weight, lambda blocks: _search(format, blocks, mask, moments, ratios))
    return QTensor.nearest(format, weight, params)


def diagonal_blocks(moment: Tensor, span: int) -> Tensor:
    """The parts (spans, width, width) of ``moment`` along its diagonal, the last one padded with zeros."""
    columns = moment.shape[0]
    width, number = B.width(columns, span), B.count(columns, span)
    short = number * width - columns
    padded = torch.constant_pad_nd(moment, (0, short, 0, short)).view(number, width, number, width)
    return padded.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _search(
    format: Format, blocks: Tensor, mask: Tensor, moments: Tensor, ratios: tuple[float, ...]
) -> dict[str, Tensor]:
    """Parameters of ``blocks`` (rows, blocks, block), decided span by span."""
    best = dict(format.fit(blocks, mask))
    least = _span_errors(format, blocks, best, moments)
    reach = blocks.abs().amax(-1, keepdim=True)
    for ratio in ratios[1:]:
        params = format.fit(torch.clamp(blocks, -ratio * reach, ratio * reach), mask)
        best, least = ranges.lesser(format, best, least, params, _span_errors(format, blocks, params, moments))
    return best


def _span_errors(format: Format, blocks: Tensor, params: F.Params, moments: Tensor) -> Tensor:
    """``d G d^T`` of every span, (rows, spans)."""
    error = format.nearest(blocks, params)[1].sub_(blocks)
    spans, width, _ = moments.shape
    flat = error.reshape(len(error), -1)
    short = spans * width - flat.shape[1]  # a last span of fewer blocks
    error = torch.constant_pad_nd(flat, (0, short)).view(-1, spans, width).transpose(0, 1)
    return ((error @ moments) * error).sum(-1).T
