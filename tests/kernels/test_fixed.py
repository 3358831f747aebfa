# SPDX-License-Identifier: Apache-2.0
"""Activations on one grid for all tokens: integers on every instruction set, and a numpy oracle of the integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from kernel_cases import HERE, raw_matrix, table_error
from raw_format import exact

from fewbit import formats, kernels, methods
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.kernels import Window, reference

GRIDS = (
    "int8/static/sym/s0.021",
    "int8/static/asym/s0.0173/z0",
    "int8/static/asym/s0.03/z255",
    "int8/static/asym/s0.02/z77",
)
INTEGERS = [row.name for row in HERE if row.family in ("int8", "int8_lut")]


def fixed(text: str) -> Fixed:
    found = formats.parse(text)
    assert isinstance(found, Fixed)
    return found


def integer_oracle(x: np.ndarray, matrix: QTensor, grid: Fixed, bias: np.ndarray) -> np.ndarray:
    """Codes of both, and their exact products; float32 only where scales are applied."""
    scale = np.float32(grid.scale)
    q = np.clip(np.rint(x / scale + np.float32(grid.zero)), 0, 255).astype(np.int64)
    codes, params = matrix.logical()
    w = codes.numpy().astype(np.int64)
    zero = (
        params["zero_point"].numpy().reshape(-1, 1).astype(np.int64)
        if "zero_point" in params
        else 1 << matrix.format.bits - 1
    )
    products = (q - grid.zero) @ (w - zero).T
    scales = scale * params["scale"].float().numpy().reshape(1, -1)
    return scales * products.astype(np.float32) + bias


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("weight", ["int8/channel/sym", "int8/channel/asym", "int4/channel/sym", "int3/channel/asym"])
def test_the_reference_is_the_integer_oracle_bit_for_bit(weight: str, grid: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, columns, tokens in itertools.product((1, 7, 33), (1, 31, 97, 300), (1, 5)):
        matrix = methods.rtn(torch.randn(rows, columns, generator=generator), formats.parse(weight))
        x, bias = torch.randn(tokens, columns, generator=generator) * 3, torch.randn(rows, generator=generator)
        prepared = kernels.prepare(matrix, "reference", fixed(grid))
        found = prepared(x, bias).numpy()
        assert np.array_equal(found, integer_oracle(x.numpy(), matrix, fixed(grid), bias.numpy()))


@pytest.mark.parametrize("kernel", INTEGERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_kernels_multiply_the_codes_of_the_grid(kernel: str, grid: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for bits, rows, columns, block in ((4, 33, 97, 0), (3, 7, 512, 64), (6, 17, 31, 0), (1, 97, 320, 32)):
        matrix = raw_matrix(kernel, bits, block, (rows, columns), generator)
        bias = torch.randn(rows, generator=generator) if bits % 2 else None
        for tokens, dtype in ((1, torch.float32), (5, torch.bfloat16), (65, torch.float16)):
            x = (torch.randn(tokens, columns, generator=generator) * 3).to(dtype)
            prepared = kernels.prepare(matrix, kernel, fixed(grid))
            y = prepared.run(x, bias, torch.float32)
            rounded = reference.round_activations(x.float(), fixed(grid))
            answer, bound = exact(matrix).answer(rounded, bias, table_error(kernel, bits))
            # The codes less 128 are what is multiplied: their magnitude, not that of what they stand for, is rounded.
            q = (rounded / fixed(grid).scale + fixed(grid).zero).round() - 128
            _, more = exact(matrix).answer(q * fixed(grid).scale, None)
            apart = abs(128 - fixed(grid).zero) * fixed(grid).scale
            sums = 2.0**-22 * apart * matrix.dequantize().abs().sum(1).double()
            assert bool(((y.double() - answer).abs() <= bound + more + sums).all())


@pytest.mark.parametrize("kernel", [name for name in INTEGERS if "lut" in name])
@pytest.mark.parametrize("zero", [0, 10, 255])
@pytest.mark.parametrize("spelling", ["palette4", "palette3/rows16", "nf4/g64", "palette6/rows16"])
def test_what_stands_for_zero_times_a_rounded_level_is_zero(spelling: str, zero: int, kernel: str) -> None:
    """Levels are rounded to integers; what that costs is in proportion to activations, not to codes less 128."""
    generator = torch.Generator().manual_seed(8)
    matrix = methods.rtn(torch.randn(48, 512, generator=generator), formats.parse(spelling))
    grid = fixed(f"int8/static/asym/s0.01/z{zero}")
    sign = -1.0 if zero == 255 else 1.0
    x = sign * torch.rand(6, 512, generator=generator) * torch.tensor([0.0, 0.02, 0.05, 0.2, 1.0, 2.0])[:, None]
    y = kernels.prepare(matrix, kernel, grid)(x)
    rounded = reference.round_activations(x, grid)
    answer, bound = exact(matrix).answer(rounded, None, table_error(kernel, matrix.format.bits))
    _, more = exact(matrix).answer(torch.full_like(x, 128 * grid.scale), None)  # what is multiplied, in float32
    sums = 2.0**-22 * 128 * grid.scale * matrix.dequantize().abs().sum(1).double()
    assert bool(((y.double() - answer).abs() <= bound + more + sums).all())


def test_eight_bits_a_row_are_integers_here_and_equal_on_every_instruction_set() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = methods.rtn(torch.randn(40, 200, generator=generator), formats.parse("int8/channel/sym"))
    x, grid = torch.randn(9, 200, generator=generator), fixed(GRIDS[3])
    chosen = kernels.choose(matrix.format, matrix.shape, activation=grid)
    assert chosen.kernel.family == "int8"
    ys = [kernels.prepare(matrix, name, grid)(x) for name in INTEGERS if name.startswith("int8_linear")]
    assert len(ys) >= 1 and all(torch.equal(y, ys[0]) for y in ys)
    # and few columns are one segment: a handful of roundings part them from the reference
    bound = 8 * 2.0**-24 * 256 * grid.scale * matrix.dequantize().abs().sum(1)
    assert bool(((ys[0] - kernels.prepare(matrix, "reference", grid)(x)).abs() <= bound).all())


@pytest.mark.parametrize("zero", [0, 1, 77, 127, 128, 129, 254, 255])
@pytest.mark.parametrize("spread", [0.004, 0.03, 0.3])
def test_signs_times_codes_around_any_zero_agree_bit_for_bit(zero: int, spread: float) -> None:
    """Sums of fours that fit a byte, that do not, and the largest that there can be."""
    generator = torch.Generator().manual_seed(zero)
    grid = fixed(f"int8/static/asym/s{spread}/z{zero}")
    for rows, columns, block in ((1, 31, 0), (17, 96, 32), (70, 300, 64), (33, 97, 0), (129, 1300, 0), (48, 520, 128)):
        matrix = raw_matrix("int8_linear_serial", 1, block, (rows, columns), generator)
        x = torch.randn(9, columns, generator=generator)
        x[3], x[4], x[5] = 1e9, -1e9, x[5].relu()
        x[6, ::2] = -1e9  # codes at both ends, side by side
        rows_here = [name for name in INTEGERS if name.startswith("int8_linear")]
        ys = [kernels.prepare(matrix, name, grid)(x[:tokens]) for name in rows_here for tokens in (1, 2, 3, 9)]
        for y, tokens in zip(ys, (1, 2, 3, 9) * len(rows_here), strict=True):
            assert torch.equal(y, ys[-1][:tokens])
        rounded = reference.round_activations(x, grid)
        answer, bound = exact(matrix).answer(rounded, None)
        codes = (rounded / grid.scale + zero).round() - 128
        _, more = exact(matrix).answer(codes * grid.scale, None)
        sums = 2.0**-22 * abs(128 - zero) * grid.scale * matrix.dequantize().abs().sum(1).double()
        assert bool(((ys[-1].double() - answer).abs() <= bound + more + sums).all())


@pytest.mark.parametrize("scale", ["0.015625", "0.021", "1.99999988", "1e-30", "1e-37", "48"])
def test_what_is_far_off_the_grid_or_between_its_points_is_rounded_alike(scale: str) -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = methods.rtn(torch.randn(24, 96, generator=generator), formats.parse("int8/channel/sym"))
    grid = fixed(f"int8/static/asym/s{scale}/z77")
    points = torch.arange(5 * 96).reshape(5, 96) - 240.0
    for x in (points * grid.scale, (points + 0.5) * grid.scale, points * 1e36, points * 1e-42):
        ys = [kernels.prepare(matrix, name, grid)(x) for name in INTEGERS if name.startswith("int8_linear")]
        assert all(torch.equal(y, ys[0]) for y in ys)


@pytest.mark.parametrize("kernel", [*INTEGERS, "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_stays_so(kernel: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = raw_matrix(kernel, 4, 0, (5, 40), generator)
    x = torch.randn(3, 40, generator=generator)
    x[1, 7] = bad
    y = kernels.prepare(matrix, kernel, fixed(GRIDS[0]))(x)
    assert bool(y[1].isnan().all()) and not bool(y[::2].isnan().any())


def test_layers_on_different_grids_share_no_rounding() -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = methods.rtn(torch.randn(32, 64, generator=generator), formats.parse("int8/channel/sym"))
    prepared = [kernels.prepare(matrix, None, fixed(grid)) for grid in GRIDS]
    x = torch.randn(4, 64, generator=generator)
    together = kernels.linear_many(x, prepared, [None] * len(GRIDS))
    assert all(torch.equal(y, one(x)) for y, one in zip(together, prepared, strict=True))


def test_a_grid_that_no_calibration_has_fixed_is_refused_when_it_runs() -> None:
    matrix = methods.rtn(torch.randn(4, 32), formats.parse("int8/channel/sym"))
    with pytest.raises(UnsupportedError, match="calibrate first"):
        kernels.prepare(matrix, None, formats.parse("int8/static/asym/mse"))(torch.zeros(1, 32))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("weight", ["int8/channel/sym", "int4/channel/sym"])
def test_convolutions_round_the_image_once(groups: int, weight: str) -> None:
    generator = torch.Generator().manual_seed(6)
    conv = torch.nn.Conv2d(8, 16, 3, 2, 1, groups=groups)
    matrix = methods.rtn(conv.weight.detach().reshape(16, -1), formats.parse(weight))
    x, grid = torch.randn(3, 8, 9, 7, generator=generator).relu(), fixed("int8/static/asym/s0.013/z0")
    window = Window((3, 3), (2, 2), (1, 1), (1, 1), groups)
    y = kernels.conv2d(x, kernels.prepare(matrix, None, grid), window, conv.bias.detach())
    rounded = reference.round_activations(x, grid).double()
    kernel = matrix.dequantize().reshape(16, -1, 3, 3).double()
    bias = conv.bias.detach().double()
    expected = torch.nn.functional.conv2d(rounded, kernel, bias, 2, 1, 1, groups)
    sizes = torch.nn.functional.conv2d(rounded.abs() + 128 * 0.013, kernel.abs(), bias.abs(), 2, 1, 1, groups)
    assert bool(((y.double() - expected).abs() <= 90 * 2.0**-24 * sizes).all())
