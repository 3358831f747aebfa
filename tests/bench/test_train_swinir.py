# SPDX-License-Identifier: Apache-2.0
"""``bench/train_swinir.py`` on made-up pictures: what is cut from them, how it is made smaller, and a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

BENCH = Path(__file__).parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import train_swinir  # noqa: E402
from swinir import SwinIR  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 32 x 32 pixels, of tiles of 48 x 48."""
    monkeypatch.setattr(train_swinir, "TILE", 48)
    monkeypatch.setattr(train_swinir, "PART", 32)


def noise(high: int, wide: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(high).integers(0, 256, (high, wide, channels), dtype=np.uint8)


def test_tiles_are_of_large_pictures_and_neither_flat_nor_transparent(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    rough = noise(320, 320, 4)
    rough[..., 3] = 255
    rough[:, 160:, 3] = 0  # half of it is not there
    Image.fromarray(rough).save(tmp_path / "below" / "half.png")
    Image.fromarray(np.full((320, 320, 3), 90, dtype=np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(noise(100, 100)).save(tmp_path / "small.png")
    (tmp_path / "note.txt").write_text("no picture")
    found = train_swinir.tiles([tmp_path])
    # of 320 x 160 pixels, and of 60 % of them, which is 192 x 96, every 32 a tile of 48 that fits
    assert found.shape == (9 * 4 + 5 * 2, 3, 48, 48) and found.dtype == torch.uint8
    assert torch.equal(found[0].permute(1, 2, 0), torch.from_numpy(rough[:48, :48, :3]))


def test_batches_are_parts_of_tiles_turned_and_mirrored() -> None:
    torch.manual_seed(0)
    places = torch.arange(48 * 48).reshape(1, 1, 48, 48)
    tile = torch.cat([places // 48, places % 48, torch.zeros_like(places)], 1).to(torch.uint8)
    part = next(train_swinir.batches(tile, 8))
    assert part.shape == (8, 3, 32, 32)
    ways, every = set(), sorted((r, c) for r in range(32) for c in range(32))
    for down, right, _ in (part * 255).round().long():
        ways.add(tuple(int(a[at] - a[0, 0]) for a in (down, right) for at in ((1, 0), (0, 1))))
        rows, columns = ((a - a.min()).flatten().tolist() for a in (down, right))
        assert sorted(zip(rows, columns, strict=True)) == every
    assert len(ways) == 8, "four turns, each mirrored or not"


def test_making_smaller_keeps_what_is_even_and_where_things_are() -> None:
    filter = train_swinir.bicubic(torch.device("cpu"))
    assert filter.shape == (1, 1, 16, 16) and float(filter.sum()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(filter, filter.flip(2)) and torch.equal(filter, filter.mT)
    even = train_swinir.shrunk(torch.full((1, 3, 32, 32), 51 / 255), filter)
    assert torch.equal(even, torch.full((1, 3, 8, 8), 51.0) / 255)
    ramp = (torch.arange(32.0) / 64).expand(1, 3, 32, 32)
    middle = train_swinir.shrunk(ramp, filter)[0, 0, 4, 2:6]
    wanted = (torch.arange(2, 6) * 4 + 1.5) / 64  # the middle of four pixels
    assert bool(((middle - wanted).abs() <= 0.51 / 255).all())


def test_a_few_steps_learn_one_picture_into_the_weights_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(train_swinir, "WARM", 1)
    tile = torch.from_numpy(np.array(Image.fromarray(noise(6, 6)).resize((48, 48), Image.Resampling.BICUBIC)))
    made = SwinIR(channels=12, heads=2, size=8, depths=(2,))
    before = [parameter.detach().clone() for parameter in made.parameters()]
    rows = list(train_swinir.train(tile.permute(2, 0, 1)[None], made, 1.0, 4, 5e-3, steps=10))
    assert [step for step, _, _ in rows] == [1, 10] and rows[1][2] < 0.9 * rows[0][2]
    assert all(parameter.isfinite().all() for parameter in made.parameters())
    moved = [bool((now != old).any()) for now, old in zip(made.parameters(), before, strict=True)]
    assert all(moved)
