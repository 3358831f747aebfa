# SPDX-License-Identifier: Apache-2.0
"""Fields packed by the compiled core: the bytes are those of the way in torch."""

from __future__ import annotations

import pytest
import torch

from fewbit.core import compiled
from fewbit.layouts import dense


@pytest.mark.parametrize("columns", [1, 7, 31, 33, 97])
@pytest.mark.parametrize("bits", range(1, 9))
def test_both_ways_give_the_same_bytes_and_codes(bits: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(1 << bits, (5, columns + 1), dtype=torch.uint8, generator=generator)[:, 1:]
    views = [codes, codes[:1], codes[:, :1], codes.T[:1]]
    packed = [dense.pack_rows(view, bits) for view in views]
    found = [dense.unpack_rows(each, bits, view.shape[1]) for each, view in zip(packed, views, strict=True)]
    monkeypatch.setattr(compiled, "grids", lambda: None)
    for view, each, back in zip(views, packed, found, strict=True):
        assert torch.equal(each, dense.pack_rows(view, bits)) and each.dtype == torch.uint8
        assert torch.equal(back, view) and back.dtype == torch.uint8
        assert torch.equal(dense.unpack_rows(each, bits, view.shape[1]), view)
