# SPDX-License-Identifier: Apache-2.0
"""Slow and exact. :func:`oracle` is what every kernel is tested against; :func:`linear` is what runs when no kernel
can: a few rows at a time are dequantized and multiplied by torch, so that memory stays bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor

CHUNK = 1 << 22
"""Weights dequantized at a time: 16 MiB of float32."""


def oracle(x: Tensor, qtensor: QTensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in float64: x (..., columns) -> (..., rows)."""
    y = x.double() @ qtensor.dequantize().double().T
    return y if bias is None else y + bias.double()


def round_activations(x: Tensor, format: Format | None) -> Tensor:
    """``x`` (..., columns) rounded to ``format`` token by token, as it arrives; itself when ``format`` is None."""
    if format is None:
        return x
    flat = x.reshape(-1, x.shape[-1]).float()
    params = F.fit(format, flat)
    return F.decode(format, F.encode(format, flat, params), params).reshape(x.shape).to(x.dtype)


def _chunks(qtensor: QTensor) -> list[tuple[slice, Tensor, dict[str, Tensor]]]:
    """(rows, their codes, their parameters), cut so that no part has more than :data:`CHUNK` weights."""
    codes, params = qtensor.logical()
    step = max(1, CHUNK // qtensor.shape[1])
    cuts = [slice(row, row + step) for row in range(0, qtensor.shape[0], step)]
    return [(cut, codes[cut], {name: values[cut] for name, values in params.items()}) for cut in cuts]


def linear(x: Tensor, qtensor: QTensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with float32 arithmetic: x (..., columns) -> (..., rows) in x's dtype."""
    flat = x.reshape(-1, x.shape[-1]).float()
    y = torch.empty(flat.shape[0], qtensor.shape[0], device=x.device)
    for cut, codes, params in _chunks(qtensor):
        y[:, cut] = flat @ F.decode(qtensor.format, codes, params).T
    if bias is not None:
        y += bias.float()
    return y.reshape(*x.shape[:-1], qtensor.shape[0]).to(x.dtype)


def backward(gradient: Tensor, qtensor: QTensor) -> Tensor:
    """``gradient W``: gradient of the output (..., rows) -> that of x (..., columns)."""
    flat = gradient.reshape(-1, gradient.shape[-1]).float()
    x = torch.zeros(flat.shape[0], qtensor.shape[1], device=gradient.device)
    for cut, codes, params in _chunks(qtensor):
        x += flat[:, cut] @ F.decode(qtensor.format, codes, params)
    return x.reshape(*gradient.shape[:-1], qtensor.shape[1]).to(gradient.dtype)
