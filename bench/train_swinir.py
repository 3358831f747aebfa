# SPDX-License-Identifier: Apache-2.0
"""Train SwinIR-light to enlarge photos four times. One command, weights and a log.

    python bench/train_swinir.py --photos FOLDER ... --minutes 7 --out OUT

Photos are all images of at least 100,000 pixels below the folders, without what is transparent. Each is made so small
that its longer side has at most 2,048 pixels, which takes away what compression left, and is seen at 60 % of that too.
Parts of 192 x 192 pixels, turned and mirrored, are made four times smaller by a bicubic filter and rounded to bytes;
the network is to find them again. Adam, L1, a rate that rises for 200 steps and falls along a cosine of the time; what
is kept is the mean of the weights over about the last 1,000 steps. Set5 is looked at after the end only.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import superres
from cifar_resnets import ASSETS
from swinir import SCALE, SwinIR

LONGEST, LEAST, SMALLER = 2048, 100_000, 0.6
TILE, PART = 288, 192
"""Height and width of what photos are cut into, and of what the network is to find."""
FLAT = 2.0
"""Mean difference of neighbours, in steps of 1/255, below which a tile shows nothing."""
WARM, DECAY = 200, 0.999
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def photos(folders: list[Path]) -> Iterator[Image.Image]:
    """Large images below ``folders``, RGBA, made smaller."""
    Image.MAX_IMAGE_PIXELS = None
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    for file in (file for file in files if not file.is_symlink()):
        photo = Image.open(file)
        if photo.width * photo.height >= LEAST:
            photo.draft("RGB", (LONGEST, LONGEST))  # a JPEG is decoded no larger than needed
            yield smaller(photo.convert("RGBA"), min(1.0, LONGEST / max(photo.size)))


def smaller(photo: Image.Image, share: float) -> Image.Image:
    size = (round(share * photo.width), round(share * photo.height))
    return photo if share == 1 else photo.resize(size, Image.Resampling.LANCZOS)


def tiles(folders: list[Path]) -> Tensor:
    """(tiles, 3, 288, 288) bytes: all that is opaque and not flat."""
    found = []
    for photo in itertools.chain.from_iterable((p, smaller(p, SMALLER)) for p in photos(folders)):
        pixels = np.array(photo)
        for top, left in itertools.product(*(range(0, length - TILE + 1, PART) for length in pixels.shape[:2])):
            tile = pixels[top : top + TILE, left : left + TILE]
            rough = np.abs(np.diff(tile[..., 1].astype(np.int16))).mean()
            if tile[..., 3].min() == 255 and rough > FLAT:
                found.append(tile[..., :3])
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def batches(tiles: Tensor, size: int) -> Iterator[Tensor]:
    """(size, 3, 192, 192) of 0 .. 1, without end: parts of random tiles, turned and mirrored."""
    device, room = tiles.device, TILE - PART + 1
    line = torch.arange(PART, device=device)
    while True:
        which = torch.randint(len(tiles), (size,), device=device)
        top, left = (torch.randint(room, (size, 1), device=device) + line for _ in range(2))
        part = tiles[which[:, None, None], :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)
        quarter = size // 4
        part = torch.cat([part[i * quarter : (i + 1) * quarter].rot90(i, (2, 3)) for i in range(4)])
        yield torch.cat([part[::2], part[1::2].flip(3)]).float() / 255


def bicubic(device: torch.device) -> Tensor:
    """(1, 1, 16, 16): the filter that makes images four times smaller, with a = -1/2 and wide enough not to alias."""
    x = ((torch.arange(4 * SCALE, dtype=torch.float64) - 2 * SCALE + 0.5) / SCALE).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    line = torch.where(x <= 1, near, far) / SCALE
    line = line / line.sum()
    return (line[:, None] * line)[None, None].float().to(device)


def shrunk(large: Tensor, filter: Tensor) -> Tensor:
    """Four times smaller, rounded to steps of 1/255."""
    border = 3 * SCALE // 2
    x = F.pad(large, (border,) * 4, mode="reflect").flatten(0, 1)[:, None]
    small = F.conv2d(x, filter, stride=SCALE).reshape(*large.shape[:2], *(n // SCALE for n in large.shape[2:]))
    return (small * 255).round().clamp(0, 255) / 255


def in_float(layer: nn.Module) -> None:
    """Its arithmetic stays in float32 where that of others is bfloat16: what comes in, and what goes out."""
    run: Callable[[Tensor], Tensor] = layer.forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return run(x.float())

    layer.forward = forward  # type: ignore[method-assign]


def train(
    found: Tensor, made: SwinIR, minutes: float, size: int, rate: float, steps: int | None = None
) -> Iterator[tuple[int, float, float]]:
    """Yields (step, seconds, loss) from time to time. At the end ``made`` has the mean weights."""
    device, began = found.device, time.monotonic()
    running = copy.deepcopy(made).train()
    for layer in (running.conv_first, running.upsample[0]):
        in_float(layer)
    if device.type == "cuda":
        for group in running.layers:
            for block in group.residual_group.blocks:
                block.compile()
    filter, weights = bicubic(device), list(running.parameters())
    rule = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99), fused=device.type == "cuda")
    losses: list[Tensor] = []
    for step, large in enumerate(batches(found, size), 1):
        past = step / steps if steps else (time.monotonic() - began) / (60 * minutes)
        if past > 1:
            return
        for group in rule.param_groups:
            group["lr"] = rate * min(1.0, step / WARM) * 0.5 * (1 + math.cos(math.pi * past))
        with torch.autocast(device.type, torch.bfloat16):
            out = running(shrunk(large, filter))
        loss = F.l1_loss(out.float(), large)
        rule.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        rule.step()
        with torch.no_grad():
            mean = list(made.parameters())
            torch._foreach_lerp_(mean, weights, 1 - min(DECAY, 1 - 1 / step))
        losses.append(loss.detach())
        if step in (1, 10, 100) or step % 500 == 0:
            yield step, time.monotonic() - began, float(torch.stack(losses).mean())
            losses.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="folders of images")
    parser.add_argument("--out", type=Path, required=True, help="a folder, for swinir.safetensors and log.json")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where super-resolution/Set5 lies")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--batch", type=int, default=32, help="a multiple of 4")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = tiles(arguments.photos).to(device)
    made = SwinIR().to(device)
    log: dict[str, Any] = {name: str(value) for name, value in vars(arguments).items()}
    log["tiles"], log["torch"], log["losses"] = len(found), torch.__version__, []
    log["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(log, flush=True)
    for row in train(found, made, arguments.minutes, arguments.batch, arguments.rate, arguments.steps):
        log["losses"].append(row)
        print(*row, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    made = made.cpu().eval()
    save_file(made.state_dict(), arguments.out / "swinir.safetensors")
    log["PSNR of Set5"] = superres.score(made, 1.0, arguments.assets)
    (arguments.out / "log.json").write_text(json.dumps(log, indent=1))
    print(log["PSNR of Set5"], "dB on Set5", flush=True)


if __name__ == "__main__":
    main()
