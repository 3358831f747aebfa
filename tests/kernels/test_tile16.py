# SPDX-License-Identifier: Apache-2.0
"""The layout tile16: hand-placed bits, and a bijection in both of its implementations."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SIZES
from raw_format import Raw

from fewbit import formats
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError
from fewbit.kernels import TILE16, native
from fewbit.kernels.tile16 import pack_codes, size, unpack_rows
from fewbit.layouts.dense import DENSE

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def lane(packed: torch.Tensor, bits: int, tile: int, chunk: int, vector: int, row: int) -> int:
    """One 32-bit lane, read by the drawing of the layout and nothing else."""
    at = (chunk * bits + vector) * 64 + row * 4
    return int.from_bytes(bytes(packed[tile, at : at + 4].tolist()), "little")


@pytest.mark.parametrize(
    ("bits", "code", "column", "fields"),
    [
        # (vector, shift, value) of each part of the code
        (1, 0b1, 37, [(0, 9, 0b1)]),
        (2, 0b10, 17, [(1, 8, 0b10)]),
        (3, 0b101, 21, [(1, 10, 0b01), (2, 13, 0b1)]),
        (4, 0b1001, 30, [(3, 20, 0b1001)]),
        (5, 0b10110, 9, [(1, 8, 0b0110), (4, 10, 0b1)]),
        (6, 0b110111, 31, [(3, 28, 0b0111), (5, 30, 0b11)]),
        (7, 0b1011110, 8, [(1, 0, 0b1110), (4, 4, 0b01), (6, 2, 0b1)]),
        (8, 0b10000001, 35, [(0, 24, 0b10000001)]),
    ],
)
def test_bits_lie_where_the_drawing_says(bits: int, code: int, column: int, fields: list[tuple[int, int, int]]) -> None:
    codes = torch.zeros(40, 70, dtype=torch.uint8)
    codes[18, column] = code
    packed = pack_codes(codes, bits)
    for vector, shift, value in fields:
        assert lane(packed, bits, 1, column // 32, vector, 2) == value << shift
        packed[1, (column // 32 * bits + vector) * 64 + 8 :][:4] = 0
    assert not packed.any()


@needs_native
@pytest.mark.parametrize("bits", range(1, 9))
def test_both_implementations_agree_and_invert(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows in SIZES:
        for columns in SIZES:
            codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
            packed = pack_codes(codes, bits)
            natively = torch.full(size((rows, columns), bits), 255, dtype=torch.uint8)
            native.core().tile16_pack(codes.data_ptr(), columns, rows, columns, bits, natively.data_ptr())
            assert torch.equal(packed, natively)
            back = torch.full((rows, columns), 255, dtype=torch.uint8)
            native.core().tile16_unpack(packed.data_ptr(), rows, columns, bits, back.data_ptr(), columns)
            assert torch.equal(back, codes)
            assert torch.equal(unpack_rows(packed, (rows, columns), bits, torch.arange(rows)), codes)
            assert native.core().tile16_bytes(rows, columns, bits) == packed.numel()


@pytest.mark.parametrize("spelling", formats.EXAMPLES)
def test_every_format_survives_the_layout(spelling: str) -> None:
    weight = torch.randn(19, 512, generator=torch.Generator().manual_seed(1))
    format = formats.parse(spelling).bind(weight)
    if format.height > 1:
        assert str(format.height) in str(TILE16.refuse(format, (19, 512)))
        return
    params = F.fit(format, weight)
    matrix = QTensor.of(format, F.encode(format, weight, params), params)
    codes, back = matrix.repack(TILE16).repack(DENSE).logical()
    assert torch.equal(codes, matrix.packed)
    assert all(torch.equal(back[name], params[name].expand_as(back[name])) for name in params)


def test_misshapen_bytes_are_refused() -> None:
    format = Raw(4, 32)
    matrix = QTensor.of(
        format, torch.zeros(17, 33, dtype=torch.uint8), {"scale": torch.ones(17, 2, 1), "offset": torch.ones(17, 2, 1)}
    ).repack(TILE16)
    short = QTensor(format, TILE16, matrix.shape, matrix.packed[:, :-1], matrix.params)
    with pytest.raises(InputError, match="tile16"):
        short.logical()
