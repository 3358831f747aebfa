# SPDX-License-Identifier: Apache-2.0
"""Rotation: inputs mixed by a randomized Hadamard matrix, so that no channel stands out.

Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman 2024 (QuaRot), arXiv:2404.00456: their
online transform ``x' = (x * signs) H / sqrt(k)``, the weight absorbing the inverse. Where we depart from it:

* they fuse all rotations but those before o_proj and down_proj into neighbouring weights and norms; here every layer
  rotates its own input when it runs. That costs k multiplications a channel and needs to know nothing about the
  architecture: no norm folded, no head untied, no head dimension;
* they take Hadamard matrices of other orders from a table where the width is no power of two; here the matrix is
  block-diagonal, with blocks of the largest power of two that divides the width.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.core.rewrite import Rotation, power_of_two


def rotate(weight: Tensor, facts: Facts | None, seed: int) -> Rotation:
    """A rotation of the inputs of ``weight`` (rows, columns) with signs drawn from ``seed``; ``facts`` are ignored."""
    return Rotation.random(weight.shape[1], seed)


def refuse(columns: int) -> str | None:
    """None, or why inputs of that width cannot be rotated."""
    if power_of_two(columns) > 1:
        return None
    return f"{columns} columns are odd, so no Hadamard matrix of a power of two divides them"
