# SPDX-License-Identifier: Apache-2.0
"""A quantized convolution: what stands where a network had a ``torch.nn.Conv2d``."""

from __future__ import annotations

from torch import Tensor, nn

from fewbit import kernels
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import Window
from fewbit.layouts.dense import DENSE
from fewbit.model.layers import Multiplier


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


class QuantConv2d(Multiplier):
    """``torch.nn.Conv2d`` whose weight, as the matrix (out, in / groups * taps), is in few bits.

    A token is a window: what inputs are rounded to ``activation`` by, for each group apart.
    """

    def __init__(
        self,
        format: str,
        layout: str,
        shape: tuple[int, int],
        window: Window,
        bias: nn.Parameter | None,
        activation: str | None = None,
    ) -> None:
        super().__init__(format, layout, shape, bias, activation)
        self.window = window
        self.in_channels = shape[1] // (window.size[0] * window.size[1]) * window.groups
        self.out_channels = shape[0]

    @classmethod
    def of(cls, conv: nn.Conv2d, matrix: QTensor, activation: str | None = None) -> QuantConv2d:
        """``conv`` with its weight replaced by ``matrix``, in the dense layout; the bias is shared.

        Raises:
            InputError: the matrix is not of the shape of ``conv.weight.reshape(out, -1)``.
            UnsupportedError: as :func:`window_of`.
        """
        expected = (conv.out_channels, conv.weight[0].numel())
        if matrix.shape != expected:
            raise InputError(
                f"a matrix of {matrix.shape} for {conv}", f"its weight is {expected}", "the same would work"
            )
        stored = matrix.repack(DENSE)
        bias = conv.bias if isinstance(conv.bias, nn.Parameter) else None
        made = cls(stored.format.name, "dense", stored.shape, window_of(conv), bias, activation)
        for array, tensor in {"packed": stored.packed, **stored.params}.items():
            getattr(made, f"weight_{array}").copy_(tensor)
        return made.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.conv2d(x, self.prepared, self.window, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}"
