# SPDX-License-Identifier: Apache-2.0
r"""HQQ: rounding to nearest on grids moved, without data, so that most weights are met closely and outliers may not be.

Badri, Shaji 2023, Half-Quadratic Quantization (mobiusml.github.io/hqq_blog, github.com/mobiusml/hqq): with the scale as
fitted, the zero z of every block is chosen for ``min |W - W_r|_p^p``, p < 1, by half-quadratic splitting. An auxiliary
error ``W_e`` stands for ``W - W_r`` under a penalty that grows, and both are solved for in turn::

    W_e = shrink(W - W_r),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z   = mean over the block of  W_q - (W - W_e) / scale
    beta = kappa beta

An affine grid is ``scale * code + offset`` with ``offset = -scale * z``, so the second line moves the offset by
``mean(W - W_r - W_e)``, which is how it is written here. ``|x|^(p-1) / beta`` has a unit: it is about weights as they
are. Errors below ``beta^(1 / (p-2))``, 0.17 by default, are shrunk to zero; of weights of usual size that is all of
them, and the iteration then is the alternating least squares of codes and offset.

Rounds end when the mean of ``|W - W_r|`` over the whole tensor no longer falls, as in the authors' code. (Blocks that
stopped each for itself did so too early: the squared error of most of them was still falling, and 2 bits lost more.)
Where we depart from that code:

* what is kept are the grids of least mean, not those of the round after;
* the penalty grows, as the text has it; the default solver of their code leaves it as it is (``kappa=1``);
* groups lie along the inputs (their ``axis=1``), as kernels read them; theirs lie along the outputs by default;
* the offset of each round is the one that the format stores, so there is no rounding after the search.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format, Physical
from fewbit.core.qtensor import QTensor
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import objective, ranges

NEARLY = 1 - 1e-5
"""Of the size at which errors begin to be shrunk to more than zero: powers are rounded."""


@exact()
def hqq(
    weight: Tensor,
    format: Format,
    facts: Facts | None = None,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QTensor:
    """Quantize ``weight`` (rows, columns) to nearest on grids moved by half-quadratic optimization; no data.

    Args:
        weight: float, (rows, columns).
        format: one whose blocks have a float offset.
        facts: ignored.
        p: power of the errors that is minimised, below 1 so that few large ones cost little.
        beta: penalty of the first round, in the unit of the weights (see the module).
        kappa: factor of the penalty from round to round, at least 1.
        iterations: rounds at most.

    Returns:
        A QTensor whose mean absolute error is at most that of rounding to nearest.

    Raises:
        InputError: the weight is no matrix or holds NaN or infinity.
        SpecError: an option is out of range.
        UnsupportedError: the blocks of ``format`` have no float offset.
    """
    objective.check("hqq", weight, format)
    reason = refuse(format)
    if reason is not None:
        raise UnsupportedError(f"hqq to {format.name}", reason, "int4/g64/min has one")
    if not (0 < p <= 1 and beta > 0 and kappa >= 1 and iterations >= 0):
        raise SpecError(
            f"hqq with p={p}, beta={beta}, kappa={kappa}, iterations={iterations}",
            "p must lie in (0, 1], beta above 0, kappa at 1 or above, iterations at 0 or above",
            "p=0.7, beta=10, kappa=1.01 and iterations=20 are the authors' choice",
        )
    weight = weight.float()
    format = format.bind(weight)
    params, mask = F.fit(format, weight), B.present(weight.shape[1], format.block)
    strips = ranges.strips(*weight.shape)
    chunks = [B.split(weight[rows], format.block) for rows in strips]
    tried = [{name: values[rows] for name, values in params.items()} for rows in strips]
    least, errors = _lost(format, chunks, tried, mask)
    for number in range(iterations):
        moved = [
            _moved(format, of, error, mask, p, beta * kappa**number) for of, error in zip(tried, errors, strict=True)
        ]
        found, errors = _lost(format, chunks, moved, mask)
        if found >= least:
            break
        least, tried = found, moved
    params = {name: torch.cat([part[name] for part in tried]) for name in params}
    return QTensor.nearest(format, weight, params)


def refuse(format: Format) -> str | None:
    """None, or why there is nothing for this method to choose in ``format``."""
    if format.free_offset:
        return None
    return "its blocks have no float offset, and this method moves grids by small parts of a step"


def shrink(error: Tensor, p: float, beta: float) -> Tensor:
    """The minimiser over e of ``|e|^p + beta / 2 (e - error)^2``, approximately, entry by entry."""
    if p < 1 and float(torch.stack(error.aminmax()).abs().max()) < NEARLY * beta ** (1 / (p - 2)):
        return torch.zeros_like(error)  # powers of all entries, which take longer than all the rest, would say so too
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp_min(0)


def _lost(
    format: Format, chunks: list[Tensor], params: list[dict[str, Tensor]], mask: Tensor
) -> tuple[float, list[Tensor]]:
    """Sum of all errors' magnitudes, and the errors of every chunk (rows, blocks, block)."""
    errors = [(blocks - format.nearest(blocks, of)[1]).mul_(mask) for blocks, of in zip(chunks, params, strict=True)]
    # by row first, so that the sum does not depend on how rows are cut into chunks
    return float(torch.cat([error.abs().sum((1, 2), dtype=torch.float64) for error in errors]).sum()), errors


def _moved(
    format: Format, params: dict[str, Tensor], error: Tensor, mask: Tensor, p: float, beta: float
) -> dict[str, Tensor]:
    """``params`` (rows, blocks, 1) with offsets moved by what of ``error`` (rows, blocks, block) does not count."""
    by = (error - shrink(error, p, beta)).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    grid = format.physical(params)
    assert isinstance(grid, Physical) and grid.offset is not None  # free_offset
    return format.with_offset(params, grid.offset.unsqueeze(-1) + by)
