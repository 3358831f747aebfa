# SPDX-License-Identifier: Apache-2.0
"""Law 2: a kernel equals ``x @ decode(...).T`` in float64 within its bound, for every row of the table, on every
instruction set that this machine can be forced to."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from kernel_cases import (
    BATCHES,
    FAMILIES,
    FLOAT_ROWS,
    SIZES,
    activation,
    product_error,
    raw_matrix,
    refused,
    table_error,
)
from raw_format import exact

from fewbit import formats, kernels
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.formats.palette import WIDTHS
from fewbit.kernels.decoded import DECODED
from fewbit.kernels.table import LOOKED_UP, MOST_ROW_BITS, PRODUCTS
from fewbit.kernels.vector16 import VECTOR16

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place of the dtype that y is rounded to."""


def check(
    rows: list[str], matrix: QTensor, x: torch.Tensor, bias: torch.Tensor | None, activation: Format | None = None
) -> None:
    """``rows`` of one family on ``x`` against float64; where they round their inputs, on the rounded ones."""
    expected = exact(matrix)
    if x.numel() >= DECODED * matrix.shape[1]:  # torch adds up whole rows
        expected = replace(expected, operations=max(expected.operations, matrix.shape[1] + 12))
    errors = table_error(rows[0], matrix.format.bits), product_error(rows[0], matrix.format.bits)
    rounded = None
    for row in rows:
        ready = kernels.prepare(matrix, row, activation)
        y, inputs = ready(x, bias), ready.inputs(x)
        assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], matrix.shape[0])
        if rounded is None or not torch.equal(inputs, rounded):
            rounded, (answer, bound) = inputs, expected.answer(inputs, bias, *errors)
            bound = bound + ROUNDING[x.dtype] * (answer.abs() + bound)
        error, where = (y.double() - answer).abs(), (row, matrix.format.name, matrix.shape, x.shape)
        assert bool((error <= bound).all()), (*where, float((error - bound).max()))


def refuse(rows: list[str], matrix: QTensor, activation: Format | None, reason: str) -> None:
    for row in rows:
        with pytest.raises(UnsupportedError, match=reason):
            kernels.prepare(matrix, row, activation)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kernel", FAMILIES)
def test_sizes_blocks_and_batches(kernel: str, bits: int) -> None:
    generator, members = torch.Generator().manual_seed(bits), FAMILIES[kernel]
    if "row_lut" in kernel and (bits not in WIDTHS or (kernel.startswith("int8") and bits > MOST_ROW_BITS)):
        refuse(members, raw_matrix(kernel, bits, 0, (33, 97), generator), activation(kernel), f"has {bits}")
        return
    for i, rows in enumerate(SIZES):
        for j, columns in enumerate(SIZES):
            block = (0, 16, 32, 64)[(i + j + bits) % 4]  # every block meets every width, every size, and all of both
            matrix = raw_matrix(kernel, bits, block, (rows, columns), generator)
            batch = BATCHES[(rows + columns + block) % len(BATCHES)]
            x = torch.randn(batch, columns, generator=generator)
            inputs = activation(kernel, ("channel", "g32", "g96")[(rows + block) % 3])
            block = matrix.format.block
            if (reason := refused(kernel, bits)) is not None:
                refuse(members, matrix, inputs, reason)
            elif (inputs is not None or kernel.startswith("int24")) and block % 32 and block < columns:
                refuse(members, matrix, inputs, "whole chunks")
            else:
                check(members, matrix, x, torch.randn(rows, generator=generator) if block else None, inputs)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", FAMILIES)
def test_dtypes_strides_and_unaligned_rows(kernel: str, dtype: torch.dtype) -> None:
    inputs, rows = activation(kernel), FAMILIES[kernel]
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        matrix = raw_matrix(kernel, 3, 32, (33, 97), generator)
        whole = torch.randn(2 * batch, 101, generator=generator).to(dtype)
        bias = torch.randn(33, generator=generator).to(dtype)
        check(rows, matrix, whole[::2, 1:98], bias, inputs)
        check(rows, matrix, whole[:1, 3:100].expand(batch, 97), bias, inputs)
        check(rows, matrix, whole.T[:97, :batch].T, None, inputs)
        check(rows, matrix, whole[:, 1:98].reshape(2, batch, 97), bias, inputs)


def by_tiles(format: Format) -> bool:
    """Whether the 16 rows of a tile have nothing that differs but scales."""
    return not any(param.per == "rows" for param in format.params) or format.group_rows % 16 == 0


@cache
def example(spelling: str) -> tuple[QTensor, torch.Tensor]:
    """A matrix fitted once for all tests of its format (tables take long), and an input."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(33, 512, generator=generator)
    format = formats.parse(spelling).bind(weight)
    params = F.fit(format, weight)
    matrix = QTensor.of(format, F.encode(format, weight, params), params, rows=33)
    return matrix, torch.randn(3, 512, generator=generator)


@pytest.mark.parametrize("spelling", formats.EXAMPLES)
def test_every_format_that_can_be_spelt(spelling: str) -> None:
    matrix, x = example(spelling)
    format = matrix.format
    rows = [row.name for row in kernels.KERNELS if row.refuse(format, matrix.shape) is None]
    family = kernels.table.family(format)
    chunks = format.block % 32 == 0
    runs = ["int24_linear"] * (family == "affine" and chunks) + [f"{family}_linear"] * by_tiles(format)
    runs += ["int24_lut"] * (family == "lut" and chunks and by_tiles(format) and format.bits <= PRODUCTS)
    runs += ["row_lut"] * any(param.per == "rows" for param in format.params)
    assert rows == [*(row for row in FLOAT_ROWS if row.startswith(tuple(runs))), "reference"]
    for row in rows:
        check([row], matrix, x, None)
        check([row], matrix, x, None, formats.parse("int8/g64/sym"))


@pytest.mark.parametrize("spelling", formats.EXAMPLES)
def test_every_format_by_integers_or_with_a_reason(spelling: str) -> None:
    matrix, x = example(spelling)
    format = matrix.format
    found = kernels.table.family(format)
    integers = [row for row in kernels.KERNELS if row.integers and row.isa in kernels.native.isas()]
    takes = {"int8": found == "affine", "int8_lut": found == "lut" and format.bits <= LOOKED_UP and by_tiles(format)}
    tables = any(param.per == "rows" for param in format.params) and format.bits <= MOST_ROW_BITS
    takes["int8_vector"] = found == "vector" and VECTOR16.refuse(format, matrix.shape) is None
    for row, rounding in itertools.product(integers, map(formats.parse, ("int8/channel", "int8/g32", "int8/g128"))):
        takes["int8_row_lut"] = tables and rounding.block == format.block == 0
        fits = takes[str(row.family)] and format.block % 32 == 0
        assert (row.refuse(format, matrix.shape, rounding) is None) == fits
        if fits:
            check([row.name], matrix, x, None, rounding)


@pytest.mark.parametrize("kernel", FAMILIES)
def test_zeros_denormals_and_huge_scales_give_no_nan(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = activation(kernel)
    for scale in (0.0, 2.0**-24, 1e-40, 65504.0, 1e30):
        for bits in (1, 3, 4) if "lut" in kernel and kernel.startswith("int") else (1, 3, 4, 8):
            matrix = raw_matrix(kernel, bits, 32, (17, 96), generator, scale=scale)
            expected, ready = exact(matrix), [kernels.prepare(matrix, row, inputs) for row in FAMILIES[kernel]]
            for size in (0.0, 1e-42, 1.0, 1e4):
                x = torch.randn(3, 96, generator=generator) * size
                errors = table_error(kernel, bits), product_error(kernel, bits)
                answer, bound = expected.answer(ready[0].inputs(x), None, *errors)
                # Absolute part: products below the least normal float32 may vanish, and activations are scaled by
                # up to 2^-30 before they meet their codes.
                least = 96 * 256 * 2.0**-149 * (2.0**30 * scale + 1)
                for y in (row(x) for row in ready):
                    assert bool(((y.double() - answer).abs() <= bound + least).all()), (scale, bits, size)
                    assert not bool(y.isnan().any())
