# SPDX-License-Identifier: Apache-2.0
"""float16, in which scales, minima, levels and books are stored."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 65504.0


def of(values: Tensor) -> Tensor:
    """``values`` rounded to float16, kept finite."""
    return values.clamp(-LARGEST, LARGEST).to(torch.float16)
