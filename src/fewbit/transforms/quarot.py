# SPDX-License-Identifier: Apache-2.0
"""QuaRot: the residual stream and the values of every head turned by randomized Hadamard matrices, at no cost when the
model runs: the weights on both sides absorb them.

Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman 2024, arXiv:2404.00456. With tokens as rows,
Q orthogonal and every norm's weights folded into the matrices W (rows, columns) that read what it gives::

    embeddings E Q       reading W Q      writing Q^T W, bias b Q      values, head by head:  R^T W, bias b R
                                                                       what reads heads:      W R, head by head

Norms without weights commute with Q: |x Q| = |x|. Where a norm subtracts the mean as well (LayerNorm), Q is made to
leave the vector of ones alone, so that means do not move either. Where we depart from the paper:

* down_proj is rotated online by transform ``hadamard``; o_proj only by option ``output``, then over all heads at once;
* queries and keys are not rotated after their position embeddings: that only serves a quantized cache;
* for LayerNorm they subtract the mean in the matrices before and replace the norm; here the norm stays as it is, and
  what it adds becomes b / w Q.

Source: Paley and Sylvester for the matrices, see :mod:`fewbit.core.orders`; signs follow from the run's seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewbit.core.orders import order_of
from fewbit.core.rewrite import Hadamard, Rotation, Signed, hadamard, power_of_two
from fewbit.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Turn:
    """An orthogonal matrix Q of order ``width``: ``apply`` takes x (..., width) to x Q."""

    width: int
    apply: Callable[[Tensor], Tensor]

    def blocks(self, x: Tensor) -> Tensor:
        """``x`` (..., n width) with every ``width`` entries turned."""
        return self.apply(x.unflatten(-1, (-1, self.width))).flatten(-2)


def turned(width: int, seed: int, centred: bool = False) -> Turn:
    """A randomized Hadamard matrix of order ``width``; where none is known, one of blocks of a power of two.

    Args:
        centred: leave the vector of ones alone: H^T D H / width with D random signs, the first of them 1.

    Raises:
        UnsupportedError: nothing but the identity is known for that width.
    """
    known = order_of(width)
    if power_of_two(width) < 2 or (centred and known is None):
        found = f"no Hadamard matrix of order {width} is known here"
        raise UnsupportedError(f"turning vectors of {width}", found, "a width of 2^m, or that times 12, 20, 28, ...")
    step: Signed = Rotation.random(width, seed) if known is None else Hadamard.random(width, seed)
    if not centred:
        return Turn(width, step.apply)
    return Turn(width, lambda x: _about_ones(x, step))


def _about_ones(x: Tensor, step: Signed) -> Tensor:
    """``x H^T D H / width``: H's first row being ones, (1, ..., 1) H^T is ``width`` times its first entry."""
    signs = step.factors.to(x.dtype).sign()
    signs = signs * signs[0]
    middle = hadamard(x, step.block, step.order, transposed=True) * signs
    return hadamard(middle, step.block, step.order) / step.columns
