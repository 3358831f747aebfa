# SPDX-License-Identifier: Apache-2.0
r"""Grids searched block by block under an importance matrix, as llama.cpp fits its k-quants.

With ``h_i = E[x_i^2]`` of the inputs (llama.cpp's imatrix) and m the mean square of the weights of a span, an error of
weight w counts

::

    v_i (w_hat_i - w_i)^2,     v_i = h_i sqrt(2 m + w_i^2)

For every block a number of grids is tried: the codes of the nearest levels of a grid that reaches a little less or more
than the block, then the scale, and the offset where there is one, of least squares under v for these codes. The best is
stored (scales of k-quants are coded in turn), and least squares are taken once more for the codes that the stored grid
gives. What :mod:`fewbit.methods.clip` searches is one ratio a span, with the ends of blocks where they are.

After ``make_qx_quants`` and ``make_qkx3_quants`` of github.com/ggml-org/llama.cpp (ggml-quants.c). Where we depart:

* a span keeps rounding to nearest where that loses less under v, so that the objective is never worse;
* the super scale is that of the largest scale of a span; they search for it too, except that ours is tried again with
  each round of least squares;
* m is of a span for all formats, where they take that of the row for blocks without super scales;
* symmetric grids of every width, not only of the widths of its types, may have negative scales;
* a zero point on the grid (``int4/g64/asym``), which no type of theirs has, is rounded after the search: there
  :mod:`fewbit.methods.clip` may well lose less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format, Params
from fewbit.core.qtensor import QTensor
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import objective, ranges

FARTHEST = 0.9
"""Steps by which the grids tried reach less or more than a block."""
_TINY = torch.finfo(torch.float64).tiny


def refuse(format: Format) -> str | None:
    """None, or why there is no grid to search in ``format``."""
    reason = objective.refuse_vectors(format)
    if reason is None and not format.grid:
        reason = "its levels are not evenly spaced on a grid that can be put anywhere"
    return reason


@exact()
def imatrix(weight: Tensor, format: Format, facts: Facts | None = None, *, steps: int = 37, rounds: int = 2) -> QTensor:
    """Quantize ``weight`` (rows, columns) to the nearest levels of grids searched under E[x^2].

    Args:
        weight: float, (rows, columns).
        format: one of even grids; ggml's types are ``Q4_K``, ``Q6_K``, ``Q4_0``, ``int2/g16x16/asym/s4`` (Q2_K), ...
        facts: of the inputs; E[x^2] is used. Without facts, or when no token was seen, all inputs count the same.
        steps: grids tried a block.
        rounds: times that least squares are taken for the codes of stored grids.

    Returns:
        A QTensor whose error weighted by v is at most that of rounding to nearest, span by span.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width).
        SpecError: ``steps`` or ``rounds`` out of range.
        UnsupportedError: the levels of ``format`` are no even grid.
    """
    objective.check("imatrix", weight, format, facts)
    if (reason := refuse(format)) is not None:
        raise UnsupportedError(f"imatrix to {format.name}", reason, "Q4_K and int4/g64/asym work; clip takes any grid")
    if steps < 2 or rounds < 0:
        works = "steps=37 and rounds=2 are the defaults"
        raise SpecError(f"imatrix with steps={steps} and rounds={rounds}", "at least 2 steps and 0 rounds", works)
    weight = weight.float()
    format = format.bind(weight)
    mask = B.present(weight.shape[1], format.block)
    worth = mask if facts is None else B.split(facts.mean_square.float().reshape(1, -1), format.block)
    params = ranges.by_strips(format, weight, lambda blocks: _search(format, blocks, mask, worth, steps, rounds))
    return QTensor.nearest(format, weight, params)


def importance(format: Format, blocks: Tensor, mask: Tensor, worth: Tensor) -> Tensor:
    """v of each of ``blocks`` (rows, blocks, block), float64; ``mask`` and ``worth`` (1, blocks, block), 0 on
    padding."""
    number = blocks.shape[1]
    repeat = ranges.span_blocks(format, number)
    square = B.split(blocks.double().square().sum(-1), repeat).sum(-1, keepdim=True)
    mean = square / B.split(mask.double().sum(-1), repeat).sum(-1, keepdim=True)
    return worth * (2 * B.per_block(mean, number, repeat) + blocks.double().square()).sqrt()


def _search(format: Format, blocks: Tensor, mask: Tensor, worth: Tensor, steps: int, rounds: int) -> dict[str, Tensor]:
    """Parameters of ``blocks`` (rows, blocks, block), decided span by span."""
    best, v = dict(format.fit(blocks, mask)), importance(format, blocks, mask, worth)
    least, wide = _span_errors(format, blocks, v, best), blocks.double()
    grids = _symmetric if format.grid == "magnitude" else _between
    scale, offset = grids(format, wide, v, mask, steps)
    for left in range(rounds, -1, -1):
        params = format.placed(scale.float(), offset.float())
        best, least = ranges.lesser(format, best, least, params, _span_errors(format, blocks, v, params))
        if left:
            codes = format.nearest(blocks, params)[0].double()
            scale, offset = _least_squares(format, codes, wide, v)
    return best


def _span_errors(format: Format, blocks: Tensor, v: Tensor, params: Params) -> Tensor:
    """``sum v (w_hat - w)^2`` of every span, float64 (rows, spans)."""
    errors = (format.nearest(blocks, params)[1].double() - blocks).square_().mul_(v).sum(-1)
    return B.split(errors, ranges.span_blocks(format, errors.shape[1])).sum(-1)


def _least_squares(format: Format, codes: Tensor, wide: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset (rows, blocks, 1) of least ``sum v (scale * code + offset - w)^2`` that ``format`` can have."""

    def total(values: Tensor) -> Tensor:
        return (v * values).sum(-1, keepdim=True)

    if format.grid == "magnitude":
        codes = codes - format.levels / 2
        scale = total(codes * wide) / total(codes * codes).clamp_min(_TINY)
        return scale, -scale * (format.levels / 2)
    s0, s1, s2 = v.sum(-1, keepdim=True), total(codes), total(codes * codes)
    x, xq = total(wide), total(codes * wide)
    apart = (s0 * s2 - s1 * s1).clamp_min(_TINY)
    scale, offset = (s0 * xq - s1 * x) / apart, (s2 * x - s1 * xq) / apart
    if format.free_offset:
        return scale, offset
    through = xq / s2.clamp_min(_TINY)  # no grid begins above zero
    return torch.where(offset > 0, through, scale), offset.clamp_max(0)


def _symmetric(format: Format, wide: Tensor, v: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The best grid of every block around zero: its largest weight lies near the end that has one level more."""
    half = format.levels / 2
    most = wide.gather(-1, wide.abs().argmax(-1, keepdim=True))
    scale = -most / half
    least = torch.full_like(scale, torch.inf)
    for more in torch.linspace(-FARTHEST, FARTHEST, steps, dtype=torch.float64).tolist():
        tried = -most / (half + more)
        codes = (wide / torch.where(tried == 0, 1.0, tried)).round().clamp(-half, half - 1) + half
        found, _ = _least_squares(format, codes, wide, v)
        errors = (v * (found * (codes - half) - wide).square()).sum(-1, keepdim=True)
        better = (errors < least) & (found != 0)
        least, scale = torch.where(better, errors, least), torch.where(better, found, scale)
    return scale, -scale * half


def _between(format: Format, wide: Tensor, v: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The best grid of every block between its two ends."""
    top = format.levels - 1
    low = torch.where(mask > 0, wide, torch.inf).amin(-1, keepdim=True)
    low = low if format.free_offset else low.clamp_max(0)
    reach = torch.where(mask > 0, wide, -torch.inf).amax(-1, keepdim=True) - low
    scale, offset = reach / top, low
    least = torch.full_like(scale, torch.inf)
    for more in torch.linspace(-FARTHEST, FARTHEST, steps, dtype=torch.float64).tolist():
        tried = reach / (top + more)
        codes = ((wide - low) / torch.where(tried == 0, 1.0, tried)).round().clamp(0, top)
        s, o = _least_squares(format, codes, wide, v)
        errors = (v * (s * codes + o - wide).square()).sum(-1, keepdim=True)
        better = (errors < least) & (s > 0)
        least = torch.where(better, errors, least)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset
