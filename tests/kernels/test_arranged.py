# SPDX-License-Identifier: Apache-2.0
"""Layouts arranged for AVX2: hand-placed bits, a bijection, and the rows that take them."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SIZES

from fewbit import formats, kernels, methods
from fewbit.core.layout import Layout
from fewbit.kernels import TILE16, native
from fewbit.kernels.arranged import BYTES16, HALVES16, ROWHALVES16, unpack_rows_of_arranged
from fewbit.kernels.row16 import ROW16
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
    native.core().arrange(*codes.shape, 3, 0, packed.data_ptr())
    assert torch.equal(packed, halves(codes))


def test_bits_of_rows_lie_where_the_drawing_says() -> None:
    matrix = methods.rtn(torch.randn(3, 700, generator=torch.Generator().manual_seed(4)), formats.parse("palette3/row"))
    codes, packed = matrix.logical()[0], matrix.repack(ROWHALVES16).packed
    expected = torch.zeros_like(packed)
    chunks = -(-700 // 128)
    for row in range(3):
        for column in range(700):
            code, chunk, k = int(codes[row, column]), column // 128, column % 128
            first, n = chunk // 4 * 4, k // 16
            beside = min(4, chunks - first)
            for bit in range(3):
                byte, place = (n // 2, n % 2 * 4 + bit) if n < 6 else (bit, 4 * (n - 6) + 3)
                at = first * 48 + (byte * beside + chunk - first) * 16 + k % 16
                expected[row, at] |= (code >> bit & 1) << place
    assert torch.equal(packed, expected)
    assert torch.equal(matrix.repack(ROWHALVES16).repack(ROW16).packed, matrix.repack(ROW16).packed)


def test_bytes_lie_where_the_drawing_says() -> None:
    codes = torch.randint(0, 2, (18, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    packed = pack_codes(codes, 1)
    lanes = packed.reshape(2, 3, 16, 4)
    order = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]
    expected = lanes[:, :, order].transpose(2, 3).reshape(2, -1)
    native.core().arrange(*codes.shape, 1, 0, packed.data_ptr())
    assert torch.equal(packed, expected)


@pytest.mark.parametrize(("spelling", "layout"), [("int3/channel", HALVES16), ("int1/channel", BYTES16)])
def test_it_is_a_bijection_of_any_size(spelling: str, layout: Layout) -> None:
    generator = torch.Generator().manual_seed(2)
    for rows in SIZES:
        for columns in SIZES:
            matrix = methods.rtn(torch.randn(rows, columns, generator=generator), formats.parse(spelling))
            there = matrix.repack(layout)
            codes = matrix.logical()[0]
            assert torch.equal(there.repack(DENSE).logical()[0], codes)
            few = torch.randint(0, rows, (5,), generator=generator)
            assert torch.equal(
                unpack_rows_of_arranged(there.packed, (rows, columns), matrix.format.bits, few), codes[few]
            )


def test_other_bits_are_refused() -> None:
    assert "3 bits" in str(HALVES16.refuse(formats.parse("int4/g128"), (16, 32)))


@pytest.mark.skipif("avx2" not in native.isas(), reason="rows of AVX2 take it")
@pytest.mark.parametrize("spelling", ["int3/g64", "palette3", "int1/g64", "sign/channel"])
def test_rows_that_multiply_by_int8_hold_it(spelling: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 192, generator=generator)
    matrix, activation = methods.rtn(weight, formats.parse(spelling)), formats.parse("int8/channel")
    row = "int8_lut_linear_avx2" if spelling == "palette3" else "int8_linear_avx2"
    ready = kernels.prepare(matrix, row, activation)
    floats = kernels.prepare(matrix, row.replace("int8", "affine").replace("affine_lut", "lut"))
    assert ready.qtensor().layout is (HALVES16 if "3" in spelling else BYTES16)
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


@pytest.mark.skipif("avx2" not in native.isas(), reason="rows of AVX2 take it")
def test_tables_of_rows_hold_it() -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = methods.rtn(torch.randn(41, 700, generator=generator), formats.parse("palette3/row"))
    activation = formats.parse("int8/channel")
    ready = kernels.prepare(matrix, "int8_row_lut_linear_avx2", activation)
    assert ready.qtensor().layout is ROWHALVES16
    assert torch.equal(torch.cat([part.clone() for _, part in ready.decoded()]), matrix.dequantize())
    assert torch.equal(kernels.embedding(torch.arange(41), ready.qtensor()), matrix.dequantize())
    serial = kernels.prepare(matrix, "int8_row_lut_linear_serial", activation)
    for tokens in (1, 2, 5, 40):
        x = torch.randn(tokens, 700, generator=generator)
        assert torch.equal(ready(x), serial(x))
