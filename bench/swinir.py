# SPDX-License-Identifier: Apache-2.0
"""SwinIR-light (Liang et al. 2021, arXiv:2108.10257), which enlarges images four times: the network that 2DQuant was
made for.

Attention is among the positions of windows of 8 x 8, to which a learned bias is added that depends on how far two
positions are apart. In every other block the image is rolled by half a window before, so that windows overlap those of
the block before; a mask keeps what the roll brought together from the other side of the image apart. Names of weights
are those of the authors' files, without what can be computed from sizes. ``bench/train_swinir.py`` trains one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit.network import Product

SCALE = 4
MEAN = (0.4488, 0.4371, 0.4040)
"""Of red, green and blue in the photos of DIV2K, from 0 to 1."""
FORBIDDEN = -100.0
"""Added to the score of two positions that may not see one another."""


def windows(x: Tensor, size: int) -> Tensor:
    """(images, high, wide, channels) -> (images * windows, size * size, channels), of whole windows."""
    images, high, wide, channels = x.shape
    x = x.reshape(images, high // size, size, wide // size, size, channels).transpose(2, 3)
    return x.reshape(-1, size * size, channels)


def image(x: Tensor, high: int, wide: int) -> Tensor:
    """The inverse of :func:`windows`."""
    size = int(x.shape[1] ** 0.5)
    x = x.reshape(-1, high // size, wide // size, size, size, x.shape[2]).transpose(2, 3)
    return x.reshape(-1, high, wide, x.shape[5])


def mask(high: int, wide: int, size: int, shift: int) -> Tensor:
    """(windows, positions, positions): 0 for two positions of an image rolled by ``shift`` that were neighbours before
    the roll, :data:`FORBIDDEN` for others."""

    def parts(length: int) -> Tensor:
        """0 before the last window; 1 in it, 2 where it comes from the other side."""
        place = torch.arange(length)
        return (place >= length - size).int() + (place >= length - shift).int()

    region = windows((3 * parts(high)[:, None] + parts(wide))[None, :, :, None], size)[..., 0]
    return (region[:, None, :] != region[:, :, None]) * FORBIDDEN


def distances(size: int) -> Tensor:
    """(positions, positions): which row of the table holds the bias of two positions."""
    down, across = (axis.flatten() for axis in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    apart = [axis[:, None] - axis + size - 1 for axis in (down, across)]
    return apart[0] * (2 * size - 1) + apart[1]


class WindowAttention(nn.Module):
    """Of the positions of a window among themselves: (images * windows, positions, channels) -> the same."""

    relative_position_index: Tensor

    def __init__(self, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn((2 * size - 1) ** 2, heads))
        self.register_buffer("relative_position_index", distances(size), persistent=False)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.scores, self.mixed = Product(), Product()

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """``apart``: a mask of the windows of one image."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        scores = self.scores(q * q.shape[3] ** -0.5, k.transpose(2, 3))
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if apart is not None:
            scores = (scores.unflatten(0, (-1, len(apart))) + apart[:, None]).flatten(0, 1)
        y: Tensor = self.proj(self.mixed(scores.softmax(3), v).transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, middle), nn.Linear(middle, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Layer(nn.Module):
    """Attention and an MLP, each after a norm and beside a shortcut: (images, high, wide, channels) -> the same."""

    def __init__(self, channels: int, heads: int, size: int, shift: int, ratio: int) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.norm1, self.attn = nn.LayerNorm(channels), WindowAttention(channels, heads, size)
        self.norm2, self.mlp = nn.LayerNorm(channels), MLP(channels, ratio * channels)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        y = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        y = self.attn(windows(y, self.size), apart if self.shift else None)
        x = x + image(y, x.shape[1], x.shape[2]).roll((self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Layers(nn.Module):
    """Every other one shifted by half a window."""

    def __init__(self, channels: int, heads: int, size: int, depth: int, ratio: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(channels, heads, size, i % 2 * (size // 2), ratio) for i in range(depth))

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x, apart)
        return x


class Group(nn.Module):
    """Layers and a convolution, beside a shortcut: what the authors call RSTB."""

    def __init__(self, channels: int, heads: int, size: int, depth: int, ratio: int) -> None:
        super().__init__()
        self.residual_group = Layers(channels, heads, size, depth, ratio)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        y = self.conv(self.residual_group(x, apart).permute(0, 3, 1, 2))
        return x + y.permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class Embedding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class SwinIR(nn.Module):
    """(images, 3, high, wide) from 0 to 1 -> four times as high and wide. By default the 900,000 parameters of
    SwinIR-light."""

    mean: Tensor

    def __init__(
        self, channels: int = 60, heads: int = 6, size: int = 8, depths: tuple[int, ...] = (6, 6, 6, 6), ratio: int = 2
    ) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.conv_first = nn.Conv2d(3, channels, 3, padding=1)
        self.patch_embed = Embedding(channels)
        self.layers = nn.ModuleList(Group(channels, heads, size, depth, ratio) for depth in depths)
        self.norm = nn.LayerNorm(channels)
        self.conv_after_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(channels, 3 * SCALE**2, 3, padding=1), nn.PixelShuffle(SCALE))

    def forward(self, x: Tensor) -> Tensor:
        high, wide = x.shape[2:]
        x = F.pad(x - self.mean, (0, -wide % self.size, 0, -high % self.size), mode="reflect")
        first = self.conv_first(x)
        y = self.patch_embed(first.permute(0, 2, 3, 1))
        apart = mask(y.shape[1], y.shape[2], self.size, self.size // 2).to(y)
        for group in self.layers:
            y = group(y, apart)
        y = self.upsample(self.conv_after_body(self.norm(y).permute(0, 3, 1, 2)) + first)
        return y[..., : SCALE * high, : SCALE * wide] + self.mean  # type: ignore[no-any-return]
