# SPDX-License-Identifier: Apache-2.0
"""Many tokens: sums of 16 bits, which hold twice as many columns where activations leave room for these."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ROWS, activation, raw_matrix
from raw_format import exact

from fewbit import formats, kernels
from fewbit.core.qtensor import QTensor

CODES = [name for name in ROWS if name.startswith("int8_linear")]
COLUMNS = 512


def filled(magnitude: int, sign: int, start: int) -> torch.Tensor:
    """A token with a scale of 1, whose columns 0 and 1 of every four, from ``start``, add up to ``magnitude``."""
    x, columns = torch.zeros(COLUMNS), [c for c in range(start, COLUMNS) if c % 4 < 2]
    for column in columns[: magnitude // 127]:
        x[column] = 127
    x[columns[magnitude // 127]] = magnitude % 127
    x[start - 2] = 127.5  # is rounded to 127 by a scale of 1
    return sign * x


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("block", [0, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_of_16_bits_at_the_bound_of_what_they_hold(bits: int, block: int, symmetric: bool) -> None:
    generator, most = torch.Generator().manual_seed(bits), 32767 >> (bits - 1)
    codes = torch.randint(0, 2**bits, (40, COLUMNS), dtype=torch.uint8, generator=generator)
    codes[::4], codes[1::4] = 0, 2**bits - 1
    matrix = raw_matrix("int8_linear_serial", bits, block, (40, COLUMNS), generator, scale=1.0)
    if symmetric:
        scale = torch.ones(40, COLUMNS // (block or COLUMNS), 1, dtype=torch.float16)
        format = formats.parse(f"int{bits}/{f'g{block}' if block else 'channel'}/sym")
        matrix = QTensor.of(format, codes, {"scale": scale})
    else:
        matrix = QTensor.of(matrix.format, codes, dict(matrix.params))
    fit = [filled(most, sign, start) for sign in (1, -1) for start in (4, 132, 260)]
    unfit = [filled(most + more, sign, 128 * (more % 3) + 4) for sign in (1, -1) for more in (1, 2, 99, most - 63)]
    usual = [torch.randn(COLUMNS, generator=generator) for _ in range(4)]
    for tokens in (fit, unfit, usual, usual + fit[:1], usual + unfit[:1], fit + unfit + usual + fit + usual):
        x = torch.stack(tokens)
        ys = [kernels.prepare(matrix, name, activation(name))(x) for name in CODES]
        assert all(torch.equal(y, ys[0]) for y in ys)
        answer, bound = exact(matrix).answer(kernels.reference.round_activations(x, activation(CODES[0])), None)
        assert bool(((ys[0].double() - answer).abs() <= 4 * bound).all())
        assert torch.equal(ys[0][-1:], kernels.prepare(matrix, CODES[0], activation(CODES[0]))(x[-1:]))
