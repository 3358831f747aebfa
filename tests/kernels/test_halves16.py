# SPDX-License-Identifier: Apache-2.0
"""The layout halves16: hand-placed bits, a bijection, and the rows that take it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SIZES

from fewbit import formats, kernels, methods
from fewbit.kernels import TILE16, native
from fewbit.kernels.halves16 import HALVES16, unpack_rows_of_halves
from fewbit.kernels.tile16 import pack_codes, size
from fewbit.layouts.dense import DENSE

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Codes (rows, columns) as the drawing of the layout says, bit by bit."""
    rows, columns = codes.shape
    packed = torch.zeros(size((rows, columns), 3), dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            code, k = int(codes[row, column]), column % 32
            group, byte = k // 4, column // 32 * 192 + row % 16 * 4 + k % 4
            for bit in range(3):
                last = group - 6
                vector, place = (group // 2, group % 2 * 4 + bit) if group < 6 else (bit, 4 * last + 3)
                packed[row // 16, byte + vector * 64] |= (code >> bit & 1) << place
    return packed


def test_bits_lie_where_the_drawing_says() -> None:
    codes = torch.randint(0, 8, (18, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = pack_codes(codes, 3)
    native.core().halves16(*codes.shape, 0, packed.data_ptr())
    assert torch.equal(packed, halves(codes))


def test_it_is_a_bijection_of_any_size() -> None:
    generator = torch.Generator().manual_seed(2)
    for rows in SIZES:
        for columns in SIZES:
            matrix = methods.rtn(torch.randn(rows, columns, generator=generator), formats.parse("int3/channel"))
            there = matrix.repack(HALVES16)
            codes = matrix.logical()[0]
            assert torch.equal(there.repack(DENSE).logical()[0], codes)
            few = torch.randint(0, rows, (5,), generator=generator)
            assert torch.equal(unpack_rows_of_halves(there.packed, (rows, columns), few), codes[few])


def test_other_bits_are_refused() -> None:
    assert "3 bits" in str(HALVES16.refuse(formats.parse("int4/g128"), (16, 32)))


@pytest.mark.skipif("avx2" not in native.isas(), reason="rows of AVX2 take it")
@pytest.mark.parametrize("spelling", ["int3/g64", "palette3"])
def test_rows_that_multiply_by_int8_hold_it(spelling: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 192, generator=generator)
    matrix, activation = methods.rtn(weight, formats.parse(spelling)), formats.parse("int8/channel")
    row = "int8_linear_avx2" if spelling.startswith("int") else "int8_lut_linear_avx2"
    ready = kernels.prepare(matrix, row, activation)
    floats = kernels.prepare(matrix, row.replace("int8", "affine").replace("affine_lut", "lut"))
    assert ready.qtensor().layout is HALVES16
    assert floats.qtensor().layout is TILE16
    assert torch.equal(kernels.embedding(torch.arange(40), ready.qtensor()), matrix.dequantize())
    assert torch.equal(
        torch.cat([part.clone() for _, part in ready.decoded()]),
        torch.cat([part.clone() for _, part in floats.decoded()]),
    )
    serial = kernels.prepare(matrix, row.replace("avx2", "serial"), activation)
    for tokens in (1, 2, 5, 40):
        x = torch.randn(tokens, 192, generator=generator)
        assert torch.equal(ready(x), serial(x))
