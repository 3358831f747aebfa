# SPDX-License-Identifier: Apache-2.0
"""Bias correction: what quantization adds to a layer's output on average is taken from its bias.

Nagel et al. 2019, arXiv:1906.04721, section 4.2, with E[x] from calibration: the outputs of ``W'`` are off by
``(W' - W) E[x]`` in the mean, so ``b' = b + (W - W') E[x]`` leaves no mean error, whatever method chose W'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.errors import InputError


def correction(weight: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
    """What to add to the bias: float32 (rows,), summed in float64.

    Args:
        weight: (rows, columns).
        quantized: what stands for it on the same inputs, decoded.
        mean: E[x], (columns,); or (groups, columns) where rows in equal groups see inputs of their own.

    Raises:
        InputError: rows are no multiple of the groups, or widths differ.
    """
    rows, columns = weight.shape
    means = mean.double().reshape(-1, mean.shape[-1])
    if quantized.shape != weight.shape or means.shape[1] != columns or rows % len(means):
        found = f"{tuple(quantized.shape)} stands for it, and E[x] is {tuple(mean.shape)}"
        works = f"{(rows, columns)}, and ({columns},), or a group of rows a mean, would work"
        raise InputError(f"bias correction of a weight of {(rows, columns)}", found, works)
    lost = (weight.double() - quantized.double()).reshape(len(means), -1, columns)
    return torch.einsum("grc,gc->gr", lost, means).reshape(rows).float()
