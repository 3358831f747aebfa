# SPDX-License-Identifier: Apache-2.0
"""One and two tokens: rows whose tiles are read from places far apart, and activations that pairs have no room for."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ROWS, activation, raw_matrix
from raw_format import exact

from fewbit import kernels
from fewbit.kernels.table import LOOKED_UP

TILES = (1, 16, 17, 47, 64, 65, 80, 129, 200)
"""Numbers of rows around whole tiles of 16, and around units of four tiles."""
LINEAR = [name for name in ROWS if name.startswith(("int8_linear", "int8_lut", "affine", "lut"))]
CODES = [name for name in LINEAR if name.startswith("int8_linear")]


def inputs(columns: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens as they come; with few large neighbours of one sign; with nothing but these; with one sign alone."""
    usual, few, large, one = torch.randn(4, columns, generator=generator)
    few[::37], few[1::37] = -9.0, -8.5
    large = large.sign() * 5
    large[: columns // 2] = 5.0
    return torch.stack([usual, few, large, one.abs()])


@pytest.mark.parametrize("kernel", LINEAR)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_a_token_gives_the_bits_that_it_gives_beside_others(kernel: str, bits: int) -> None:
    generator, bits = torch.Generator().manual_seed(bits), min(bits, LOOKED_UP) if "int8_lut" in kernel else bits
    for rows, (columns, block) in zip(TILES, 3 * ((96, 0), (31, 0), (640, 64)), strict=True):
        matrix, x = raw_matrix(kernel, bits, block, (rows, columns), generator), inputs(columns, generator)
        run = kernels.prepare(matrix, kernel, activation(kernel))
        together = run(x)
        for token, alone in enumerate(x):
            assert torch.equal(run(alone[None]), together[token : token + 1])
        for pair in (x[:2], x[1:3], x[2:]):
            assert torch.equal(run(pair), torch.cat([run(token[None]) for token in pair]))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", ["channel", "g32"])
def test_instruction_sets_agree_bit_for_bit_and_with_float64(bits: int, zero: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, columns in zip(TILES, (577, 96, 32, 300, 1024, 65, 128, 200, 31), strict=True):
        matrix, x = raw_matrix("int8_linear_serial", bits, 0, (rows, columns), generator), inputs(columns, generator)
        for few in (x[:1], x[1:2], x[2:3], x[3:], x[:2], x[2:]):
            ys = [kernels.prepare(matrix, name, activation(name, zero))(few) for name in CODES]
            assert all(torch.equal(y, ys[0]) for y in ys)
            rounded = kernels.reference.round_activations(few, activation(CODES[0], zero))
            answer, bound = exact(matrix).answer(rounded, None)
            assert bool(((ys[0].double() - answer).abs() <= 4 * bound).all())
