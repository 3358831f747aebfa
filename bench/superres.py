# SPDX-License-Identifier: Apache-2.0
"""Five networks that enlarge images four times, Set5 to score them on, and photos to calibrate with.

IMDN (Hui et al. 2019, arXiv:1909.11856, simplified), RFDN (Liu et al. 2020, arXiv:2009.11551) and RLFN (Kong et al.
2022, arXiv:2205.07514) are convolutions; MobileSR alternates attention in windows of 8 x 8 with convolutions. Weights
are those of the challenge NTIRE 2022 on efficient super-resolution (arXiv:2205.05675), read from a folder of assets;
those of SwinIR-light (``bench/swinir.py``) are what ``bench/train_swinir.py`` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_resnets import ASSETS
from fewbit.network import Product
from swinir import SCALE, SwinIR

SET5 = ("baby", "bird", "butterfly", "head", "woman")
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
"""In color, from the data of the package scikit-image."""


def conv(inside: int, outside: int, size: int) -> nn.Conv2d:
    """That keeps the size of the image."""
    return nn.Conv2d(inside, outside, size, padding=size // 2)


def leaky(x: Tensor, slope: float = 0.05) -> Tensor:
    return F.leaky_relu(x, slope)


class DistillationBlock(nn.Module):
    """IMDN's: a quarter of the channels of each convolution goes straight to the end of the block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        kept = channels // 4
        self.sizes = [kept, channels - kept]
        # in sequences of one, as the names of the weights have it
        self.conv1 = nn.Sequential(conv(channels, channels, 3))
        self.conv2 = nn.Sequential(conv(channels - kept, channels, 3))
        self.conv3 = nn.Sequential(conv(channels - kept, channels, 3))
        self.conv4 = conv(channels - kept, kept, 3)
        self.conv1x1 = conv(4 * kept, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        rest, parts = x, []
        for layer in (self.conv1, self.conv2, self.conv3):
            part, rest = leaky(layer(rest)).split(self.sizes, 1)
            parts.append(part)
        y: Tensor = x + self.conv1x1(torch.cat([*parts, self.conv4(rest)], 1))
        return y


class Shortcut(nn.Module):
    """``x + sub(x)``"""

    def __init__(self, sub: nn.Module) -> None:
        super().__init__()
        self.sub = sub

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.sub(x)
        return y


class IMDN(nn.Module):
    def __init__(self, channels: int = 64, blocks: int = 8) -> None:
        super().__init__()
        body = nn.Sequential(*(DistillationBlock(channels) for _ in range(blocks)), conv(channels, channels, 3))
        last = conv(channels, 3 * SCALE**2, 3)
        self.model = nn.Sequential(conv(3, channels, 3), Shortcut(body), last, nn.PixelShuffle(SCALE))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


class SpatialAttention(nn.Module):
    """RFDN's and RLFN's: each position times a gate, looked up on a coarse grid. ``deep``: with two layers more."""

    def __init__(self, channels: int, width: int, deep: bool) -> None:
        super().__init__()
        self.conv1, self.conv_f, self.conv4 = conv(channels, width, 1), conv(width, width, 1), conv(width, channels, 1)
        self.conv2, self.conv3 = nn.Conv2d(width, width, 3, 2), conv(width, width, 3)
        self.deep = deep
        if deep:
            self.conv_max, self.conv3_ = conv(width, width, 3), conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.conv1(x)
        coarse = F.max_pool2d(self.conv2(fine), 7, 3)
        if self.deep:
            coarse = self.conv3_(self.conv3(self.conv_max(coarse).relu()).relu())
        else:
            coarse = self.conv3(coarse)
        spread = F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)
        return x * self.conv4(spread + self.conv_f(fine)).sigmoid()


class FeatureBlock(nn.Module):
    """RFDN's: a 1 x 1 convolution takes half of the channels from before each residual 3 x 3 one to the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.c1_d, self.c2_d, self.c3_d = (conv(channels, half, 1) for _ in range(3))
        self.c1_r, self.c2_r, self.c3_r = (conv(channels, channels, 3) for _ in range(3))
        self.c4, self.c5 = conv(channels, half, 3), conv(4 * half, channels, 1)
        self.esa = SpatialAttention(channels, channels // 4, deep=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for take, layer in ((self.c1_d, self.c1_r), (self.c2_d, self.c2_r), (self.c3_d, self.c3_r)):
            parts.append(leaky(take(x)))
            x = leaky(layer(x) + x)
        y: Tensor = self.esa(self.c5(torch.cat([*parts, leaky(self.c4(x))], 1)))
        return y


class RFDN(nn.Module):
    def __init__(self, channels: int = 50) -> None:
        super().__init__()
        self.fea_conv = conv(3, channels, 3)
        self.B1, self.B2, self.B3, self.B4 = (FeatureBlock(channels) for _ in range(4))
        self.c = nn.Sequential(conv(4 * channels, channels, 1))
        self.LR_conv = conv(channels, channels, 3)
        self.upsampler = nn.Sequential(conv(channels, 3 * SCALE**2, 3), nn.PixelShuffle(SCALE))

    def forward(self, x: Tensor) -> Tensor:
        first = self.fea_conv(x)
        found = [first]
        for block in (self.B1, self.B2, self.B3, self.B4):
            found.append(block(found[-1]))
        y: Tensor = self.upsampler(self.LR_conv(leaky(self.c(torch.cat(found[1:], 1)))) + first)
        return y


class LocalBlock(nn.Module):
    """RLFN's: three convolutions beside a shortcut, and the gate."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = conv(channels, middle, 3), conv(middle, middle, 3), conv(middle, channels, 3)
        self.c5, self.esa = conv(channels, channels, 1), SpatialAttention(channels, 16, deep=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.esa(self.c5(x + leaky(self.c3_r(leaky(self.c2_r(leaky(self.c1_r(x))))))))
        return y


class RLFN(nn.Module):
    def __init__(self, channels: int = 46, middle: int = 48) -> None:
        super().__init__()
        self.fea_conv = conv(3, channels, 3)
        self.B1, self.B2, self.B3, self.B4 = (LocalBlock(channels, middle) for _ in range(4))
        self.LR_conv = conv(channels, channels, 3)
        self.upsampler = nn.Sequential(conv(channels, 3 * SCALE**2, 3), nn.PixelShuffle(SCALE))

    def forward(self, x: Tensor) -> Tensor:
        first = self.fea_conv(x)
        y: Tensor = self.upsampler(self.LR_conv(self.B4(self.B3(self.B2(self.B1(first))))) + first)
        return y


class Attention(nn.Module):
    """Of the positions of a window among themselves: (windows, positions, channels) -> the same."""

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj_out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.scores, self.mixed = Product(), Product()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        weights = self.scores(q * q.shape[3] ** -0.5, k.transpose(2, 3)).softmax(3)
        y: Tensor = self.proj_out(self.mixed(weights, v).transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, middle), nn.GELU(), nn.Linear(middle, channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


class Transformer(nn.Module):
    """A position embedding by depthwise convolution, attention in windows, and an MLP, each beside a shortcut."""

    def __init__(self, channels: int, ratio: int, window: int = 8) -> None:
        super().__init__()
        self.window = window
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1, self.attn = nn.LayerNorm(channels), Attention(channels)
        self.norm2, self.mlp = nn.LayerNorm(channels), MLP(channels, ratio * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        images, high, wide, channels = x.shape
        size = self.window
        y = F.pad(self.norm1(x), (0, 0, 0, -wide % size, 0, -high % size))
        down, across = y.shape[1] // size, y.shape[2] // size
        y = y.reshape(images, down, size, across, size, channels).transpose(2, 3)
        y = self.attn(y.reshape(-1, size * size, channels))
        y = y.reshape(images, down, across, size, size, channels).transpose(2, 3)
        x = x + y.reshape(images, down * size, across * size, channels)[:, :high, :wide]
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)


class InvertedResidual(nn.Module):
    """Wider by a 1 x 1 convolution, a depthwise one there, and back."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        wide = ratio * channels
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        acts = (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2))
        self.net = nn.Sequential(conv(channels, wide, 1), acts[0], depthwise, acts[1], conv(wide, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x) + x
        return y


class Body(nn.Module):
    def __init__(self, channels: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        pairs = ((Transformer(channels, ratio), InvertedResidual(channels, ratio)) for ratio in ratios)
        self.layers = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.layers:
            x = pair(x)
        return x


class MobileSR(nn.Module):
    def __init__(self, channels: int = 40, ratios: tuple[int, ...] = (4, 2, 2, 2, 4)) -> None:
        super().__init__()
        self.head, self.body = conv(3, channels, 3), Body(channels, ratios)
        self.fuse, self.tail = conv(2 * channels, channels, 3), conv(channels, 3, 3)
        twice = (layer for _ in range(2) for layer in (conv(channels, 4 * channels, 1), nn.PixelShuffle(2)))
        self.upsapling = nn.Sequential(*twice)  # as the file has it

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x)
        y = self.upsapling(self.fuse(torch.cat([first, self.body(first)], 1)))
        y = self.tail(leaky(y, 0.2))
        return y + F.interpolate(x, scale_factor=SCALE, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Kind:
    """Of network: what builds it, the white that it works with, its first and last layer, and whether it attends."""

    build: Callable[[], nn.Module]
    white: float
    ends: tuple[str, str]
    attends: bool = False


NETWORKS = {
    "imdn": Kind(IMDN, 1.0, ("model.0", "model.2")),
    "rfdn": Kind(RFDN, 255.0, ("fea_conv", "upsampler.0")),
    "rlfn": Kind(RLFN, 255.0, ("fea_conv", "upsampler.0")),
    "mobilesr": Kind(MobileSR, 1.0, ("head", "tail"), attends=True),
    "swinir": Kind(SwinIR, 1.0, ("conv_first", "upsample.0"), attends=True),
}


def network(name: str, weights: Path | None = None) -> nn.Module:
    """With its trained weights, those of the assets by default, for evaluation."""
    made = NETWORKS[name].build()
    made.load_state_dict(load_file(weights or ASSETS / "super-resolution" / f"{name}.safetensors"))
    return made.eval()


def pixels(image: Image.Image) -> Tensor:
    """(1, 3, height, width) from 0 to 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def set5(assets: Path = ASSETS) -> Iterator[tuple[Tensor, Tensor]]:
    """(small, large) of each image; the small ones were made by Matlab's bicubic filter."""
    folder = assets / "super-resolution" / "Set5"
    for name in SET5:
        small = Image.open(folder / "LR_bicubic" / f"X{SCALE}" / f"{name}x{SCALE}.png")
        yield pixels(small), pixels(Image.open(folder / "HR" / f"{name}.png"))


def crops(count: int, size: int, seed: int = 0) -> Tensor:
    """(count, 3, size, size) in 0 .. 1: parts of photos that have nothing to do with Set5, made smaller by a bicubic
    filter."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = []
    for name in PHOTOS:
        photo = Image.open(folder / name).convert("RGB")
        small = photo.resize((photo.width // SCALE, photo.height // SCALE), Image.Resampling.BICUBIC)
        found.append(pixels(small))
    generator, made = torch.Generator().manual_seed(seed), []
    for number in range(count):
        photo_pixels = found[number % len(found)]
        rooms = (photo_pixels.shape[2] - size + 1, photo_pixels.shape[3] - size + 1)
        top, left = (int(torch.randint(room, (), generator=generator)) for room in rooms)
        made.append(photo_pixels[..., top : top + size, left : left + size])
    return torch.cat(made)


def luma(image: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in 16 .. 235, float64, of RGB in whole steps of 1/255."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    bytes_ = (image.double() * 255).round().clamp(0, 255)
    return 16 + (bytes_ / 255 * weights[:, None, None]).sum(1)


def psnr(found: Tensor, expected: Tensor, shave: int = SCALE) -> float:
    """Of Y in dB, without the outermost ``shave`` pixels."""
    error = (luma(found) - luma(expected))[..., shave:-shave, shave:-shave]
    return float(10 * torch.log10(255**2 / error.square().mean()))


@torch.no_grad()
def score(made: nn.Module, white: float, assets: Path = ASSETS) -> float:
    """Mean PSNR on Set5."""
    values = [psnr(made(small * white) / white, large) for small, large in set5(assets)]
    return sum(values) / len(values)
