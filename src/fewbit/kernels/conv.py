# SPDX-License-Identifier: Apache-2.0
"""Convolution on the kernel table: the weight is the matrix (out, in / groups * height * width of the kernel), and each
output position is a token whose columns are the window that it sees.

:func:`route` says how a call is computed:

* ``strips``: a few windows at a time are copied out as rows and multiplied by the matrix's own kernel, bias and
  rounding of activations included. Never is more than :data:`UNFOLDED` elements of windows held (or one window, where
  that is larger), whatever the image.
* ``direct``: float activations, or such as are on one grid for all windows, at many positions, and in groups: a few
  output channels of the weight at a time are decoded to float32 for torch's convolution, which unfolds nothing.
  Decoding costs little where many positions share it, while copying windows out costs as much for them as for few.
* ``windows``: activations in groups, rounded to int8 with one scale a window: the kernels ``int8_windows_*`` round each
  window as they multiply it by the decoded weight, and no window is ever copied out.
* ``rounded``: activations in groups, rounded to any other format: strips as above, rounded by it group by group, times
  the decoded weight. Much slower than the same convolution of float activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from fewbit.core import blocks as B
from fewbit.core import given
from fewbit.errors import InputError, UnsupportedError
from fewbit.formats.affine import Affine
from fewbit.formats.fixed import Fixed
from fewbit.kernels import native, pages, reference
from fewbit.kernels.inputs import check_bias, check_supported, exact, wants_gradients
from fewbit.kernels.prepared import Prepared, PreparedMatrix
from fewbit.kernels.table import named
from fewbit.kernels.terms import PreparedTerms
from fewbit.kernels.tile16 import ROWS
from fewbit.kernels.tiled import NativePrepared
from fewbit.kernels.window import Window

UNFOLDED = 1 << 18
"""Elements of windows that are held at a time: 1 MiB of float32."""

DIRECT = 128
"""Positions from which on torch convolves float activations: fewer do not pay for bringing weights into its layout."""

MANY = 1 << 14
"""Weights of a group from which on its own products of integers are faster than rounding windows as they are met."""

Route = Literal["strips", "direct", "windows", "rounded"]


def route(prepared: Prepared, window: Window, positions: int) -> Route:
    """How :func:`conv2d` computes ``positions`` output positions (images times height times width)."""
    if prepared.activation is not None:
        if window.groups == 1 or _by_tiles(prepared, window.groups):
            return "strips"
        if isinstance(prepared.activation, Fixed):
            return "direct"
        return "windows" if _by_windows(prepared) else "rounded"
    few = positions < DIRECT or isinstance(prepared, PreparedTerms)  # a sum is never made whole where it need not be
    return "strips" if window.groups == 1 and few else "direct"


@exact
def conv2d(x: Tensor, prepared: Prepared, window: Window, bias: Tensor | None = None) -> Tensor:
    """What ``torch.nn.functional.conv2d`` computes, for the weight of ``prepared``, accumulated in float32.

    Args:
        x: (images, channels, height, width) in float32, bfloat16 or float16. Channels-last memory is read as it lies,
            and gives channels-last output.
        prepared: the weight as a matrix, rows and columns as in ``weight.reshape(out, -1)``. Its ``activation`` rounds
            each window (of each group) as the token that it is. A sum of terms is taken as well.
        window: what an output position sees.
        bias: (out,) or None.

    Returns:
        (images, out, height, width) in x's dtype. Differentiable in x and bias, as :class:`PreparedMatrix` is.

    Raises:
        InputError: shapes contradict one another, or no window fits into the image.
        UnsupportedError: x is on another device than the CPU, or of another dtype; or activations are rounded for a sum
            of terms in groups.
    """
    _check(x, prepared, window, bias)
    if wants_gradients(x, bias):
        return _Differentiable.apply(x, bias, prepared, window)  # type: ignore[no-untyped-call, no-any-return]
    return _run(x.detach(), prepared, window, bias)


def _check(x: Tensor, prepared: Prepared, window: Window, bias: Tensor | None) -> None:
    given.kind("x", x, Tensor, "a tensor (images, channels, height, width)")
    check_supported(x)
    rows, columns = prepared.shape
    asked, matrix = f"convolution of x {tuple(x.shape)}", f"the matrix is {prepared.shape} in {window.groups} groups"
    taps = window.size[0] * window.size[1]
    if columns % taps or rows % window.groups:
        raise InputError(asked, matrix, f"columns a multiple of {taps} and rows of {window.groups} would work")
    channels = columns // taps * window.groups
    if x.dim() != 4 or x.shape[1] != channels:
        raise InputError(asked, matrix, f"x of (images, {channels}, height, width) would work")
    check_bias(bias, prepared.shape)
    if prepared.activation is not None and prepared.activation.whole:
        found = f"windows are rounded as they are met; {prepared.activation.name} is known once all have been seen"
        raise UnsupportedError(asked, found, "int8/static, one grid that calibration fixes, or int8/channel, works")
    if window.groups > 1 and prepared.activation is not None and isinstance(prepared, PreparedTerms):
        found = f"each part of a sum of terms rounds inputs of its own to {prepared.activation.name}"
        raise UnsupportedError(asked, found, "float inputs, one group, or one quantized matrix would work")
    if min(window.out(x)) < 1:
        raise InputError(asked, f"no {window} fits into {tuple(x.shape[2:])}", "larger images or more padding would")


def _run(x: Tensor, prepared: Prepared, window: Window, bias: Tensor | None) -> Tensor:
    x = x.resolve_neg()
    high, wide = window.out(x)
    rows = prepared.shape[0]
    way = route(prepared, window, x.shape[0] * high * wide)
    if way == "direct":
        return _direct(x, prepared, window, bias)
    if way == "windows":
        return _windows(x, prepared, window, bias)
    if way == "strips" and window.groups > 1:
        return _group_by_group(x, prepared, window, bias)
    if window.pointwise and x.is_contiguous(memory_format=torch.channels_last):
        y = prepared(x.permute(0, 2, 3, 1), bias)
    else:
        multiply = prepared if way == "strips" else _rounded(prepared, window.groups)
        y = _strips(x, window, rows, lambda strip: multiply(strip, bias)).reshape(x.shape[0], high, wide, rows)
    y = y.permute(0, 3, 1, 2)
    return y.contiguous() if x.is_contiguous() else y


def unfold(x: Tensor, window: Window, begin: int, end: int, out: Tensor) -> None:
    """Windows [begin, end) of x, counted across, down and by image, to the rows of out (end - begin, columns): natively
    where that is possible, else as :func:`fewbit.kernels.reference.unfold`, which has the same bits."""
    if not native.available():
        out.copy_(reference.unfold(x, window, begin, end))
        return
    native.core().unfold(_members(x, window), x.data_ptr(), begin, end, out.data_ptr(), torch.get_num_threads())


def _members(x: Tensor, window: Window) -> native.Windows:
    pairs = (window.size, window.stride, window.padding, window.dilation, window.out(x))
    return (*x.shape[1:], *x.stride(), *(number for pair in pairs for number in pair), x.element_size())


def _by_tiles(prepared: Prepared, groups: int) -> bool:
    """Whether the rows of each group are tiles of a kernel of integers, and enough to be worth a call."""
    if not isinstance(prepared, NativePrepared) or not prepared.rounds_inputs:
        return False
    rows = prepared.shape[0] // groups
    return rows % prepared.unit == 0 and (rows * prepared.shape[1] >= MANY or not _by_windows(prepared))


def _group_by_group(x: Tensor, prepared: Prepared, window: Window, bias: Tensor | None) -> Tensor:
    """Each group as a convolution of its own, by its tiles."""
    assert isinstance(prepared, NativePrepared)
    rows, channels, one = prepared.shape[0] // window.groups, x.shape[1] // window.groups, replace(window, groups=1)
    ys = []
    for group in range(window.groups):
        first = group * rows
        part = prepared.tiles(first // ROWS, (first + rows) // ROWS)
        own = None if bias is None else bias[first : first + rows]
        ys.append(_run(x[:, group * channels : (group + 1) * channels], part, one, own))
    y = torch.cat(ys, 1)
    return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def _by_windows(prepared: Prepared) -> bool:
    """Whether ``int8_windows_*`` computes what ``prepared`` stands for."""
    inputs = prepared.activation
    if not (isinstance(inputs, Affine) and inputs.bits == 8 and inputs.symmetric):
        return False  # outliers among them, whose two kernels are no row of the table
    if not isinstance(prepared, PreparedMatrix) or named(prepared.kernel).isa is None:
        return False
    return B.count(prepared.shape[1], inputs.block) == 1


def _windows(x: Tensor, prepared: Prepared, window: Window, bias: Tensor | None) -> Tensor:
    """On the instruction set of the row that ``prepared`` runs on."""
    isa = named(prepared.kernel).isa
    assert isa is not None
    weight = _whole(prepared)
    bias = None if bias is None else bias.detach().float().contiguous()
    if x.shape[1] > 1 and x.stride(1) == 1:  # a channel's pixels are met one after the other
        y = _windows(x.contiguous(), prepared, window, bias)
        return y.contiguous(memory_format=torch.channels_last)
    rows = prepared.shape[0]
    y = pages.fresh(x.shape[0], rows, *window.out(x), dtype=x.dtype)
    native.core().int8_windows(
        _members(x, window),
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.shape[0],
        window.groups,
        weight.data_ptr(),
        rows,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        native.FLAGS[isa],
        torch.get_num_threads(),
    )
    return y


def _strips(x: Tensor, window: Window, rows: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """``multiply`` of the windows, (positions, rows), a bounded number of windows at a time."""
    high, wide = window.out(x)
    columns, positions = x.shape[1] * window.size[0] * window.size[1], x.shape[0] * high * wide
    step = max(1, min(positions, UNFOLDED // columns))
    windows, y = x.new_empty(step, columns), x.new_empty(positions, rows)
    for begin in range(0, positions, step):
        end = min(begin + step, positions)
        unfold(x, window, begin, end, windows[: end - begin])
        y[begin:end] = multiply(windows[: end - begin])
    return y


def _rounded(prepared: Prepared, groups: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Multiplies windows (tokens, groups * columns), rounded group by group, by the decoded weight."""
    rows, columns = prepared.shape
    weight = _whole(prepared).reshape(groups, rows // groups, columns).transpose(1, 2)

    def multiply(windows: Tensor, bias: Tensor | None) -> Tensor:
        x = reference.round_activations(windows.float().reshape(-1, columns), prepared.activation)
        y = (x.reshape(-1, groups, columns).transpose(0, 1) @ weight).transpose(0, 1).reshape(-1, rows)
        return y if bias is None else y + bias.float()

    return multiply


def _decoded(prepared: Prepared) -> Iterable[tuple[slice, Tensor]]:
    """As :meth:`PreparedMatrix.decoded`; a sum of terms comes whole."""
    if isinstance(prepared, PreparedMatrix):
        return prepared.decoded()
    return [(slice(None), prepared.weight().dequantize())]


def _whole(prepared: Prepared) -> Tensor:
    """All of the weight in float32: of a convolution in groups, which holds ``groups`` times fewer than another."""
    weight = pages.fresh(*prepared.shape)
    for rows, strip in _decoded(prepared):
        weight[rows] = strip
    return weight


def _direct(x: Tensor, prepared: Prepared, window: Window, bias: Tensor | None) -> Tensor:
    """Torch's convolution by decoded weights, a strip of output channels at a time where there are no groups."""
    parts = _decoded(prepared) if window.groups == 1 else [(slice(None), _whole(prepared))]
    image = reference.round_activations(x.float(), prepared.activation)
    bias = None if bias is None else bias.detach().float()
    found = [
        torch.nn.functional.conv2d(
            image,
            weight.reshape(weight.shape[0], -1, *window.size),
            None if bias is None else bias[rows],
            window.stride,
            window.padding,
            window.dilation,
            window.groups,
        )
        for rows, weight in parts
    ]
    return (found[0] if len(found) == 1 else torch.cat(found, 1)).to(x.dtype)


class _Differentiable(torch.autograd.Function):
    """Forward as above, backward through the dequantized weight; the weight itself is constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, prepared: Prepared, window: Window) -> Tensor:
        ctx.prepared, ctx.window, ctx.shape, ctx.has_bias = prepared, window, x.shape, bias is not None
        return _run(x, prepared, window, bias)

    @staticmethod
    @exact
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        window, weight = ctx.window, _whole(ctx.prepared)
        x = conv2d_input(
            ctx.shape,
            weight.reshape(weight.shape[0], -1, *window.size),
            gradient.float(),
            window.stride,
            window.padding,
            window.dilation,
            window.groups,
        )
        return x.to(gradient.dtype), gradient.sum((0, 2, 3)) if ctx.has_bias else None, None, None
