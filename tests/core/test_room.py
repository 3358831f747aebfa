# SPDX-License-Identifier: Apache-2.0
"""Memory for what is larger than malloc keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewbit.core import compiled, room


class Native:
    """Notes what large pages are asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def large_pages(self, data: int, nbytes: int) -> None:
        self.asked.append((data, nbytes))


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Native:
    made = Native()
    monkeypatch.setattr(compiled, "load", lambda: (made, None))
    return made


def test_only_large_arrays_ask_for_large_pages(native: Native) -> None:
    small = room.room((room.LARGE // 4 - 1,), torch.float32)
    assert small.numel() * 4 < room.LARGE and not native.asked
    large = room.room((2, room.LARGE // 8), torch.float32)
    assert large.shape == (2, room.LARGE // 8) and native.asked == [(large.data_ptr(), room.LARGE)]


def test_without_the_compiled_module_there_is_room_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    absent: tuple[Any, str] = (None, "not built")
    monkeypatch.setattr(compiled, "load", lambda: absent)
    assert room.room((room.LARGE,), torch.uint8).shape == (room.LARGE,)


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)])
def test_converted(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    assert room.converted(values, torch.float16) is values
    made = room.converted(values, torch.float32)
    assert made.dtype == torch.float32 and torch.equal(made, values.float())
