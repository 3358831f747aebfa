# SPDX-License-Identifier: Apache-2.0
"""Tables as bytes: against the definition in float64, and exact where they can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import HERE

from fewbit import formats, kernels, methods
from fewbit.core.format import Physical
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.formats.palette import Palette
from fewbit.formats.table import TABLES
from fewbit.kernels.levels import as_integers, nearest_bytes
from fewbit.kernels.table import MOST_ROW_COLUMNS


def by_definition(table: np.ndarray) -> float:
    """The least sum of squares over the steps that make the largest entry 64 to 127 of them, no entry off by more than
    1/254 of it, in float64; steps have 16 bits."""
    largest = np.abs(table).max()
    found = []
    for most in range(64, 128):
        fraction, exponent = np.frexp(largest / most)
        step = np.ldexp(np.round(fraction * 2**16), exponent - 16)
        error = np.round(table / step) * step - table
        if most == 127 or np.abs(error).max() <= largest / 254:
            found.append(float((error**2).sum()))
    return min(found)


def test_bytes_are_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(300, 16, generator=generator).half().float()
    levels, step = nearest_bytes(tables)
    made = (levels * step[:, None]).double()
    assert int(levels.abs().max()) == 127 and levels.dtype == torch.int32
    assert torch.equal(made, (levels.double() * step[:, None].double()))  # float32 holds every multiple
    errors = made - tables.double()
    assert bool((errors.abs().amax(1) <= tables.abs().amax(1) * (1 / 254 + 2.0**-17)).all())
    expected = np.array([by_definition(table.double().numpy()) for table in tables])
    found = errors.square().sum(1).numpy()
    assert np.allclose(found, expected, rtol=1e-4)
    plain = (tables / (tables.abs().amax(1, keepdim=True) / 127)).round() * (tables.abs().amax(1, keepdim=True) / 127)
    assert float(errors.square().sum()) < 0.8 * float((plain - tables).double().square().sum())


def test_a_table_of_zeros_and_the_smallest_numbers() -> None:
    tables = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0**-149, 0.0, -(2.0**-149), 0.0], [1e-30, 0.0, -1e-30, 5e-31]])
    levels, step = nearest_bytes(tables)
    assert bool(step.isfinite().all()) and bool((step > 0).all())
    assert bool(((levels * step[:, None] - tables).abs() <= tables.abs().amax(1, keepdim=True) / 254 + 2.0**-149).all())


@pytest.mark.parametrize("name", ["fp4", "pot3", "pot4"])
def test_fixed_tables_of_whole_multiples_stay(name: str) -> None:
    table = torch.tensor(TABLES[name])[None]
    assert torch.equal(as_integers(table), table)


def test_tables_of_int8_stay_and_long_ones_are_left_to_the_kernel() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    for name, stays in (("palette4/lut8", True), ("palette4/row/lut8", True), ("palette4", False), ("palette6", True)):
        made = methods.rtn(weight, formats.parse(name))
        physical = made.format.physical(made.logical()[1])
        assert isinstance(physical, Physical) and physical.table is not None
        tables = physical.table.float().reshape(-1, 2**made.format.bits)
        assert torch.equal(as_integers(tables), tables) is stays, name


@pytest.mark.skipif(not kernels.native.available(), reason="no native kernels here")
def test_what_is_decoded_has_the_levels_of_the_table() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    matrix, inputs = methods.rtn(weight, formats.parse("nf4/g64")), formats.parse("int8/channel")
    ready = kernels.prepare(matrix, "int8_lut_linear_serial", inputs)
    assert torch.equal(torch.cat([part for _, part in ready.decoded()]), matrix.dequantize())


@pytest.mark.parametrize("kernel", [row.name for row in HERE if row.family == "int8_row_lut"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_largest_sums_of_the_longest_rows_are_exact_and_one_column_more_is_refused(kernel: str, bits: int) -> None:
    inputs, columns = formats.parse("int8/channel/sym"), MOST_ROW_COLUMNS
    table = torch.zeros(2, 1, 1, 1 << bits)
    table[0, ..., 0], table[1, ..., 0] = 1, -1  # the levels 127 and -127
    codes, ones = torch.zeros(2, columns, dtype=torch.uint8), torch.ones(2, 1, 1).half()
    matrix = QTensor.of(Palette(bits, 1, True, 0), codes, {"table": table.half(), "scale": ones})
    prepared = kernels.prepare(matrix, kernel, inputs)
    for x in (torch.full((5, columns), -1.0), torch.ones(5, columns)):  # -128, and 127, in each column
        rounded = prepared.inputs(x)
        assert abs(float(rounded[0, 0] / torch.tensor(2 / 255).half().float())) in (127, 128)
        answer = rounded.double().sum(1, keepdim=True) * torch.tensor([1.0, -1.0])
        for tokens in (1, 5):
            y = prepared(x[:tokens]).double()
            assert bool(((y - answer[:tokens]).abs() <= 2.0**-21 * answer[:tokens].abs()).all())
    wider = QTensor.of(matrix.format, torch.zeros(2, columns + 1, dtype=torch.uint8), matrix.params)
    with pytest.raises(UnsupportedError, match=f"at most {columns} columns"):
        kernels.prepare(wider, kernel, inputs)
