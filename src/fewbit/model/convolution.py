# SPDX-License-Identifier: Apache-2.0
"""A quantized convolution: what stands where a network had a ``torch.nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import kernels
from fewbit.containers import terms as T
from fewbit.core.layout import UNPACKED
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.kernels import Window
from fewbit.kernels.inputs import uncompiled
from fewbit.layouts.dense import DENSE
from fewbit.model.float_weight import FloatWeight
from fewbit.model.layers import Multiplier, check_shape


@dataclass(frozen=True)
class Margin:
    """What is put around images before a kernel sees them: ``sides`` (left, right, top, bottom), filled as
    ``torch.nn.functional.pad`` does in ``mode``."""

    mode: str
    sides: tuple[int, int, int, int]

    def around(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, self.sides, self.mode)

    def fits(self, x: Tensor) -> bool:
        """Whether images are large enough to be mirrored, or gone around, so far."""
        least = {"reflect": 1, "circular": 0}.get(self.mode)
        sizes = (x.shape[-1], x.shape[-1], x.shape[-2], x.shape[-2])
        return least is None or all(side + least <= size for side, size in zip(self.sides, sizes, strict=True))


def margin_of(conv: nn.Conv2d) -> Margin | None:
    """None where kernels pad: with as many zeros on both sides."""
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if conv.padding_mode == "zeros":
        return None if (left, top) == (right, bottom) else Margin("constant", (left, right, top, bottom))
    return Margin(conv.padding_mode, (left, right, top, bottom))


def window_of(conv: nn.Conv2d) -> Window:
    """What an output position of ``conv`` sees of images with their margin around them."""
    padding = conv.padding if margin_of(conv) is None else 0
    return window(conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)


def placed_windows(conv: nn.Conv2d) -> dict[str, Any]:
    """Both, as a manifest has them."""
    margin = margin_of(conv)
    return {"window": asdict(window_of(conv))} | ({} if margin is None else {"margin": asdict(margin)})


def window(size: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Window:
    """From the arguments of ``torch.nn.functional.conv2d``: numbers, pairs, and "same" or "valid" as ``padding``.

    Raises:
        UnsupportedError: one side is padded more than the other.
    """
    size, stride, dilation = _pair(size), _pair(stride), _pair(dilation)
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):  # "same": what keeps the size of the image
        down, across = (d * (k - 1) for d, k in zip(dilation, size, strict=True))
        if down % 2 or across % 2:
            found = f"a kernel of {size} needs one more zero on one side"
            raise UnsupportedError(f"padding {padding!r}", found, "pad the input first")
        padding = (down // 2, across // 2)
    return Window(size, stride, _pair(padding), dilation, groups)


def _pair(given: Any) -> tuple[int, int]:
    down, across = (given, given) if isinstance(given, int) else given * 2 if len(given) == 1 else given
    return int(down), int(across)


class QuantConv2d(Multiplier):
    """``torch.nn.Conv2d`` whose weight, as the matrix (out, in / groups * taps), is in few bits: one quantized
    matrix or a sum of terms.

    A token is a window: what inputs are rounded to ``activation`` by, for each group apart. What ``window`` says, it
    answers under torch's names as well: a network's own code may hand them to ``torch.nn.functional.conv2d``.
    """

    def __init__(
        self,
        plain: T.Plain,
        window: Window,
        bias: nn.Parameter | None,
        activation: str | None = None,
        weight: T.Weight | None = None,
        dtype: torch.dtype | None = None,
        margin: Margin | None = None,
    ) -> None:
        super().__init__(plain, bias, activation, weight, dtype)
        self.window, self.margin, self.groups = window, margin, window.groups
        self.padding_mode = "zeros" if margin is None or margin.mode == "constant" else margin.mode
        self.kernel_size, self.stride = window.size, window.stride
        self.padding, self.dilation = window.padding, window.dilation
        self.in_channels = self.shape[1] // (window.size[0] * window.size[1]) * window.groups
        self.out_channels = self.shape[0]

    @property
    def weight(self) -> FloatWeight:
        """What a network's own code may ask of the float weight; :meth:`weight_of` gives what is stored."""
        shape = (self.shape[0], self.in_channels // self.groups, *self.kernel_size)
        return self._float_weight(shape, nn.functional.conv2d, self._convolve)

    @classmethod
    def of(cls, conv: nn.Conv2d, weight: T.Weight, activation: str | None = None) -> QuantConv2d:
        """``conv`` with its weight replaced by ``weight``, as it is packed, or in the dense layout; the bias is shared.

        Raises:
            InputError: the weight is not of the shape of ``conv.weight.reshape(out, -1)``.
        """
        check_shape(weight, (conv.out_channels, conv.weight[0].numel()), conv)
        stored = weight.repack(DENSE) if isinstance(weight, QTensor) and weight.layout is UNPACKED else weight
        bias = conv.bias if isinstance(conv.bias, nn.Parameter) else None
        about = (bias, activation, stored, conv.weight.dtype, margin_of(conv))
        return cls(T.describe(stored), window_of(conv), *about).train(conv.training)

    @uncompiled
    def forward(self, input: Tensor) -> Tensor:
        x = input if self.margin is None else self.margin.around(input)
        return kernels.conv2d(x, self.prepared, self.window, self.bias)

    def _convolve(self, x: Tensor, bias: Tensor | None, *rest: Any, **named: Any) -> Tensor:
        """``rest``, ``named``: of ``torch.nn.functional.conv2d``."""
        if (asked := window(self.kernel_size, *rest, **named)) != self.window or self.margin is not None:
            around = "" if self.margin is None else f" in {self.margin}"
            raise self.weight.refusal(f"a convolution by {asked}, where its own is {self.window}{around},")
        return kernels.conv2d(x, self.prepared, self.window, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}" + (f", {self.margin}" if self.margin else "")
