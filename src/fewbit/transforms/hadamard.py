# SPDX-License-Identifier: Apache-2.0
"""Hadamard: inputs mixed by one randomized Hadamard matrix of their whole width, every channel with every other.

Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman 2024 (QuaRot), arXiv:2404.00456: the online
transform that they put before down_proj, ``x' = (x * signs) H / sqrt(n)``, the weight absorbing the inverse. Where n is
no power of two H is Paley's matrix of a small order times Sylvester's; they take the small ones from a table. Transform
``rotate`` costs less there and mixes blocks of a power of two only.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.core.orders import order_of
from fewbit.core.rewrite import Hadamard


def hadamard(weight: Tensor, facts: Facts | None, seed: int) -> Hadamard:
    """A rotation of the inputs of ``weight`` (rows, columns) with signs drawn from ``seed``; ``facts`` are ignored."""
    return Hadamard.random(weight.shape[1], seed)


def refuse(columns: int) -> str | None:
    """None, or why inputs of that width cannot be rotated."""
    if columns > 1 and order_of(columns) is not None:
        return None
    return f"no Hadamard matrix of order {columns} is known here; rotate mixes blocks of a power of two"
