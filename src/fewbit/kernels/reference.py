# SPDX-License-Identifier: Apache-2.0
"""Slow and exact. :func:`oracle` is what every kernel is tested against; :func:`linear` is what runs when no kernel
can: a few rows at a time are dequantized and multiplied by torch, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.formats.affine import Affine
from fewbit.formats.fixed import Fixed
from fewbit.formats.outliers import Outliers
from fewbit.kernels.window import Window

CHUNK = 1 << 22
"""Weights dequantized at a time: 16 MiB of float32."""


def oracle(x: Tensor, qtensor: QTensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in float64: x (..., columns) -> (..., rows)."""
    y = x.double() @ qtensor.dequantize().double().T
    return y if bias is None else y + bias.double()


def round_activations(x: Tensor, format: Format | None) -> Tensor:
    """``x`` (..., columns) rounded to ``format`` as it arrives, token by token, or as one where there is one scale for
    all of it; itself when ``format`` is None. What holds NaN or infinity becomes NaN, as it does in kernels: no scale
    is left to it. (But of one bit, infinity: the mean that is its scale is cut off, as that of large numbers is.)"""
    if format is None:
        return x
    if isinstance(format, Outliers):
        small, large = format.split(x)
        return round_activations(small, format.inner) + large
    flat = x.reshape(-1, x.shape[-1]).float()
    good = flat.isfinite() if format.bits > 1 else ~flat.isnan()
    finite = good.all() if format.whole else good.all(-1, keepdim=True)
    params = F.fit(format, flat)
    rounded = F.decode(format, F.encode(format, flat, params), params)
    return torch.where(finite, rounded, torch.nan).reshape(x.shape).to(x.dtype)


INT24_BITS = 22
"""Bits after the first that :func:`int24` keeps of the largest activation."""


def int24(x: Tensor) -> Tensor:
    """``x`` (..., columns) float32 as the rows "int24" of the kernel table multiply it: token by token, to the nearest
    multiple of a power of two, 2^(e - 22) where max|x| < 2^(e + 1) (1 - 2^-7), halves away from 0; at least 2^-126. A
    token with NaN or infinity becomes NaN."""
    most = x.abs().amax(-1, keepdim=True)
    bits = most.contiguous().view(torch.int32) + (1 << 17)
    step = (((bits >> 23) - INT24_BITS).clamp(1, 254) << 23).view(torch.float32)
    rounded = step * torch.trunc(x / step + 0.5 * x.sign())
    return torch.where(torch.isfinite(most), rounded, torch.nan)


def row_sums(strips: Iterable[tuple[slice, Tensor]], rows: int) -> Tensor:
    """Of decoded weights, as :func:`decoded` gives them: float64 (rows,)."""
    sums = torch.empty(rows, dtype=torch.float64)
    for cut, weight in strips:
        sums[cut] = weight.sum(1, dtype=torch.float64)
    return sums


def multiplies_codes(qtensor: QTensor) -> bool:
    """Whether :func:`integer_linear` takes it: integers with one scale a row."""
    format = qtensor.format
    return isinstance(format, Affine) and format.bits > 1 and B.count(qtensor.shape[1], format.block) == 1


def integer_linear(x: Tensor, qtensor: QTensor, activation: Fixed, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` in integers, for x on one grid and a W of one scale a row: float32 (..., rows).

    With codes q and zeros z of both, ``sum (q_x - z_x) (q_w - z_w)`` is an exact integer; as kernels see it::

        acc = sum q_x q_w - z_x sum q_w - z_w sum q_x + columns z_x z_w          z_w may differ between rows
        y   = float32(float32(s_x s_w) acc) + bias
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    grid = F.fit(activation, flat)
    q = F.encode(activation, flat, grid).long()
    codes, params = qtensor.logical()
    assert isinstance(qtensor.format, Affine)
    middle = torch.full_like(params["scale"], qtensor.format.middle)
    w, zero = codes.long(), params.get("zero_point", middle).long().reshape(-1)
    acc = q @ w.T - activation.zero * w.sum(1) - q.sum(1, keepdim=True) * zero + w.shape[1] * activation.zero * zero
    y = grid["scale"].reshape(-1, 1) * params["scale"].float().reshape(1, -1) * acc.float()
    y = y if bias is None else y + bias.float()
    return y.reshape(*x.shape[:-1], qtensor.shape[0])


def _float32(value: float, beside: Tensor) -> Tensor:
    """``value`` in float32, where ``beside`` is."""
    return torch.tensor(value, dtype=torch.float32, device=beside.device)


def centred(x: Tensor, grid: Fixed, inner: int) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` less the zero of its grid, float64, and the factor of each line along the axis ``inner``: 1, or
    NaN where it holds NaN or infinity."""
    codes = grid.encode(x.float(), {"scale": _float32(grid.scale, x)})
    bad = ~x.isfinite().all(inner, keepdim=True)
    return codes.double() - grid.zero, torch.ones_like(bad, dtype=torch.float32).masked_fill(bad, torch.nan)


def integer_matmul(a: Tensor, b: Tensor, left: Fixed, right: Fixed) -> Tensor:
    """``a b`` in integers, for a (..., rows, inner) on the grid ``left`` and b (..., inner, columns) on ``right``:
    float32 (..., rows, columns)::

        y = float32(s_a s_b) float32(sum (q_a - z_a) (q_b - z_b))

    NaN where the row or the column holds NaN or infinity.
    """
    (q, row), (p, column) = centred(a, left, -1), centred(b, right, -2)
    scale = _float32(left.scale, a) * _float32(right.scale, a)
    return scale * (q @ p).float() * row * column  # sums are whole numbers far below 2^53


def _chunks(qtensor: QTensor) -> list[tuple[slice, Tensor, dict[str, Tensor]]]:
    """(rows, their codes, their parameters), cut so that no part has more than :data:`CHUNK` weights, or one row of
    codes."""
    codes, params = qtensor.logical()
    (rows, columns), height = qtensor.shape, qtensor.format.height
    step = max(1, CHUNK // columns // height)
    parts = []
    for first in range(0, len(codes), step):
        cut = slice(first, first + step)
        which = slice(first * height, min((first + step) * height, rows))
        parts.append((which, codes[cut], {name: values[cut] for name, values in params.items()}))
    return parts


def decoded(qtensor: QTensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their float32 weights (rows, columns)), cut as above."""
    parts = _chunks(qtensor)
    return ((rows, F.decode(qtensor.format, codes, params)[: rows.stop - rows.start]) for rows, codes, params in parts)


def linear(x: Tensor, qtensor: QTensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with float32 arithmetic: x (..., columns) -> (..., rows) in x's dtype."""
    flat = x.reshape(-1, x.shape[-1]).float()
    y = flat.new_empty(flat.shape[0], qtensor.shape[0])
    for cut, weight in decoded(qtensor):
        y[:, cut] = flat @ weight.T
    if bias is not None:
        y += bias.float()
    return y.reshape(*x.shape[:-1], qtensor.shape[0]).to(x.dtype)


def unfold(x: Tensor, window: Window, begin: int, end: int) -> Tensor:
    """Windows [begin, end) of x (images, channels, height, width), counted across, then down, then by image: (end -
    begin, channels * taps) in x's dtype, columns in the order of ``weight.reshape(out, -1)``."""
    (down, across), (high, wide) = window.padding, window.out(x)
    padded = torch.nn.functional.pad(x, (across, across, down, down))
    at = torch.arange(begin, end, device=x.device)
    top, left = at // wide % high * window.stride[0], at % wide * window.stride[1]
    rows = top[:, None] + torch.arange(window.size[0], device=x.device) * window.dilation[0]
    columns = left[:, None] + torch.arange(window.size[1], device=x.device) * window.dilation[1]
    images = (at // (wide * high))[:, None, None]
    windows = padded[images, :, rows[:, :, None], columns[:, None, :]]  # (windows, down, across, channels)
    return windows.permute(0, 3, 1, 2).reshape(end - begin, -1)


def backward(gradient: Tensor, qtensor: QTensor) -> Tensor:
    """``gradient W``: gradient of the output (..., rows) -> that of x (..., columns)."""
    flat = gradient.reshape(-1, gradient.shape[-1]).float()
    x = flat.new_zeros(flat.shape[0], qtensor.shape[1])
    for cut, weight in decoded(qtensor):
        x += flat[:, cut] @ weight
    return x.reshape(*gradient.shape[:-1], qtensor.shape[1]).to(gradient.dtype)
