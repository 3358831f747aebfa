# SPDX-License-Identifier: Apache-2.0
"""SpinQuant: QuaRot's rotations, learned, so that what rounding costs the whole model is least.

Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra, Tian, Blankevoort 2024, arXiv:2405.16406
(github.com/facebookresearch/SpinQuant). R1 turns the residual stream, an R2 a block the values of its heads; they start
as randomized Hadamard matrices and take steps along the manifold of orthogonal matrices (Li, Li, Todorovic 2020,
arXiv:2002.01113), with G the gradient of the loss in R::

    A = G R^T - R G^T       R' = (I + a/2 A)^-1 (I - a/2 A) R       a = min(rate, 1 / |A|_1)

The loss is the cross entropy of the next token, or the KL to the original model (option ``kl``), with the inputs of
layers rounded as they will be. Weights stay in float, since the method that follows has its own way of choosing codes;
a layer whose inputs are not rounded has its weight rounded to nearest instead, or there would be nothing to learn from.
Gradients pass every rounding as if it were not there. Where we depart from the authors' code: the step is solved
exactly, in float64, instead of by two rounds of a fixed-point iteration; keys and values are not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOOSE = 1e-10
"""Deviation of R R^T from the identity past which a step is followed by one towards the nearest orthogonal matrix."""


def cayley_step(matrix: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """The orthogonal ``matrix`` R (n, n), float64, after a step of at most ``rate`` against ``gradient``, its gradient.

    The result is orthogonal to :data:`LOOSE`.
    """
    half = gradient.double() @ matrix.T
    skew = half - half.T
    largest = float(skew.abs().sum(0).amax())
    if largest == 0:
        return matrix
    skew *= min(rate, 1 / largest) / 2
    one = torch.eye(len(matrix), dtype=torch.float64)
    after: Tensor = torch.linalg.solve(one + skew, (one - skew) @ matrix)
    if deviation(after) > LOOSE:
        after = after @ (3 * one - after.T @ after) / 2
    return after


def deviation(matrix: Tensor) -> float:
    """The largest entry of ``|R R^T - I|``."""
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().amax())
