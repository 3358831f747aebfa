# SPDX-License-Identifier: Apache-2.0
"""What oracles of methods with error feedback are asked about."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.facts import Facts


def case(rows: int, columns: int, seed: int, tokens: int = 0) -> tuple[Tensor, Facts]:
    """A weight, and the facts of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    size = torch.randn(columns, generator=generator).exp()
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mix * size
    return torch.randn(rows, columns, generator=generator), Facts.of(x, gram=True)
