# SPDX-License-Identifier: Apache-2.0
"""Window: which inputs an output position of a convolution sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbit.errors import SpecError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """The arguments of ``torch.nn.Conv2d`` other than channels, each (down, across), in elements of the image:

    ``y[n, o, h, w] = sum over c, i, j of weight[o, c, i, j] x[n, c', stride h + dilation i - padding, ...]`` with zeros
    around the image; c runs over the inputs c' of o's group.

    Raises:
        SpecError: a number is negative, or zero where only ``padding`` may be.
    """

    size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if min(*self.size, *self.stride, *self.dilation, self.groups) < 1 or min(self.padding) < 0:
            raise SpecError(str(self), "a number is too small", "padding from 0 and all others from 1 would work")

    def out(self, x: Tensor) -> Pair:
        """(height, width) of the output for x (images, channels, height, width); below 1 where no window fits."""
        high, wide = (
            (length + 2 * padding - dilation * (size - 1) - 1) // stride + 1
            for length, size, stride, padding, dilation in zip(
                x.shape[2:], self.size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return high, wide

    @property
    def pointwise(self) -> bool:
        """Whether windows are the pixels themselves, one each."""
        return self.size == (1, 1) == self.stride and self.padding == (0, 0)
