# SPDX-License-Identifier: Apache-2.0
"""A quantized convolution: what stands where a network had a ``torch.nn.Conv2d``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit import kernels
from fewbit.containers import terms as T
from fewbit.core.layout import UNPACKED
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.kernels import Window
from fewbit.layouts.dense import DENSE
from fewbit.model.layers import Multiplier, check_shape


def window_of(conv: nn.Conv2d) -> Window:
    """What an output position of ``conv`` sees.

    Raises:
        UnsupportedError: it pads with other things than zeros, or one side more than the other.
    """
    if conv.padding_mode != "zeros":
        raise UnsupportedError(f"padding mode {conv.padding_mode!r}", "kernels pad with zeros", "pad the input first")
    padding = conv.padding
    if padding == "valid":
        padding = (0, 0)
    if isinstance(padding, str):  # "same": what keeps the size of the image
        down, across = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        if down % 2 or across % 2:
            found = f"a kernel of {conv.kernel_size} needs one more zero on one side"
            raise UnsupportedError(f"padding {padding!r}", found, "pad the input first")
        padding = (down // 2, across // 2)
    down, across = padding
    size, stride, dilation = ((int(pair[0]), int(pair[1])) for pair in (conv.kernel_size, conv.stride, conv.dilation))
    return Window(size, stride, (down, across), dilation, conv.groups)


@dataclass(frozen=True)
class FloatWeight:
    """What a network's own code may ask of the ``weight`` of a quantized layer, which holds codes: the dtype and shape
    of the float one. Vision transformers cast images to that dtype. Whatever takes tensors refuses it."""

    dtype: torch.dtype
    shape: tuple[int, int, int, int]


class QuantConv2d(Multiplier):
    """``torch.nn.Conv2d`` whose weight, as the matrix (out, in / groups * taps), is in few bits: one quantized
    matrix or a sum of terms.

    A token is a window: what inputs are rounded to ``activation`` by, for each group apart. ``dtype``: of the float
    weight.
    """

    def __init__(
        self,
        plain: T.Plain,
        window: Window,
        bias: nn.Parameter | None,
        activation: str | None = None,
        weight: T.Weight | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(plain, bias, activation, weight)
        self.window, self.dtype = window, dtype
        self.in_channels = self.shape[1] // (window.size[0] * window.size[1]) * window.groups
        self.out_channels = self.shape[0]

    @property
    def weight(self) -> FloatWeight:
        """Its dtype and shape; :meth:`weight_of` gives what is stored."""
        return FloatWeight(self.dtype, (self.shape[0], self.in_channels // self.window.groups, *self.window.size))

    @classmethod
    def of(cls, conv: nn.Conv2d, weight: T.Weight, activation: str | None = None) -> QuantConv2d:
        """``conv`` with its weight replaced by ``weight``, as it is packed, or in the dense layout; the bias is shared.

        Raises:
            InputError: the weight is not of the shape of ``conv.weight.reshape(out, -1)``.
            UnsupportedError: as :func:`window_of`.
        """
        check_shape(weight, (conv.out_channels, conv.weight[0].numel()), conv)
        stored = weight.repack(DENSE) if isinstance(weight, QTensor) and weight.layout is UNPACKED else weight
        bias = conv.bias if isinstance(conv.bias, nn.Parameter) else None
        return cls(T.describe(stored), window_of(conv), bias, activation, stored, conv.weight.dtype).train(
            conv.training
        )

    def forward(self, x: Tensor) -> Tensor:
        return kernels.conv2d(x, self.prepared, self.window, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}"
