# SPDX-License-Identifier: Apache-2.0
"""The ResNets for CIFAR-10 (He et al. 2015, section 4.2) and the test images, read from a folder of assets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewbit import formats, methods
from fewbit.model.convolution import QuantConv2d

_ABOVE = (folder / "shared" / "assets" for folder in Path(__file__).resolve().parents)
ASSETS = next((folder for folder in _ABOVE if (folder / "cifar10-resnets").is_dir()), Path("shared/assets"))
"""Where the weights and the images lie, beside this checkout."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters: every second pixel, new channels zero."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.new = stride, (planes - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return F.relu(y + short)


class ResNet(nn.Module):
    """``blocks`` blocks in each of three layers: ResNet-(6 blocks + 2)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for layer, (channels, planes) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(channels, planes, 1 if layer == 1 else 2)
            rest = (Block(planes, planes, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{layer}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: Tensor = self.linear(x.mean((2, 3)))
        return y


def network(depth: int, assets: Path = ASSETS) -> ResNet:
    """ResNet-``depth`` (20, 32, 44, 56) with its trained weights, for evaluation."""
    model = ResNet((depth - 2) // 6)
    # The file has no counts of batches seen, which evaluation does not need.
    found = model.load_state_dict(load_file(assets / "cifar10-resnets" / f"resnet{depth}.safetensors"), strict=False)
    assert not found.unexpected_keys and all(key.endswith("num_batches_tracked") for key in found.missing_keys)
    return model.eval()


def test_images(assets: Path = ASSETS) -> tuple[Tensor, Tensor]:
    """(images (10000, 3, 32, 32) as the networks expect them, labels (10000,))."""
    labels = np.load(assets / "cifar10" / "test_labels.npy")
    return images("test.webp", assets), torch.from_numpy(labels).long()


def train_labels(assets: Path = ASSETS) -> Tensor:
    """Of the images "train10k.webp", (10000,)."""
    return torch.from_numpy(np.load(assets / "cifar10" / "train10k_labels.npy")).long()


def images(name: str, assets: Path = ASSETS) -> Tensor:
    """The 10,000 images of a mosaic, "test.webp" or "train10k.webp", as the networks expect them."""
    from PIL import Image

    mosaic = np.asarray(Image.open(assets / "cifar10" / name).convert("RGB"))
    tiles = mosaic.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (torch.from_numpy(tiles.copy()).float() / 255 - mean) / deviation


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    """(parent, name in it, convolution) of every one in ``model``."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                yield parent, name, child


def quantize(model: nn.Module, weight: str, activation: str | None = None) -> None:
    """Round the weight of every convolution of ``model`` to the nearest of ``weight``, and its inputs as they come."""
    for parent, name, conv in convolutions(model):
        matrix = methods.rtn(conv.weight.detach().reshape(conv.out_channels, -1), formats.parse(weight))
        setattr(parent, name, QuantConv2d.of(conv, matrix, activation))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Share of ``images`` whose largest logit is their label."""
    right = (model(x).argmax(1) == y for x, y in zip(images.split(batch), labels.split(batch), strict=True))
    return int(sum(found.sum() for found in right)) / len(labels)
