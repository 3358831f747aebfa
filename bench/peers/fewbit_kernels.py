# SPDX-License-Identifier: Apache-2.0
"""Our own kernels, as rows beside the others. Codes are random, scales as a quantized normal weight has them."""

from __future__ import annotations

import functools

import torch

from fewbit import formats, kernels
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import FewbitError
from peers.row import SAMPLE, Prepared, Problem, Row, Unavailable, rotated

FLOAT = "float32"
INTEGERS = {"avx512": "avx512vnni"}
"""The instruction set that multiplies integers where another name was asked for."""


def random(format: Format, shape: tuple[int, int]) -> QTensor:
    blocks = (shape[0], -(-shape[1] // format.block), 1)
    params = {"scale": (torch.rand(blocks) + 0.5).half() / format.levels}
    if len(format.params) > 1:
        params["zero_point"] = torch.randint(0, format.levels, blocks, dtype=torch.uint8)
    return QTensor.of(format, torch.randint(0, format.levels, shape, dtype=torch.uint8), params)


def prepare(format: Format, activation: Format | None, isa: str | None, problem: Problem) -> Prepared:
    family = kernels.choose(format, problem.shape, activation=activation).kernel.family
    if activation and family == kernels.table.family(format):
        raise Unavailable(
            f"no row multiplies it by {activation.name} as integers; its {family} row would round x first"
        )
    isa = INTEGERS.get(str(isa), isa) if activation else isa
    matrix = random(format, problem.shape)
    codes, params = matrix.logical()
    few = QTensor.of(format, codes[:SAMPLE], {name: values[:SAMPLE] for name, values in params.items()})
    try:
        first = kernels.prepare(matrix, f"{family}_linear_{isa}" if isa else None, activation)
    except FewbitError as error:
        raise Unavailable(str(error)) from error
    again = functools.partial(kernels.prepare, matrix, first.kernel, activation)
    calls = rotated(problem, first.read_bytes, lambda: functools.partial(again(), problem.x))
    return Prepared(first.kernel, first.read_bytes, calls, first(problem.x), few.dequantize())


def rows(spellings: list[str], activations: list[str], isa: str | None) -> list[Row]:
    """Every format with every activation format; ``isa`` forces an instruction set."""
    made = []
    for activation in activations:
        inputs = None if activation == FLOAT else formats.parse(activation)
        for spelling in spellings:
            format = formats.parse(spelling)
            make = functools.partial(prepare, format, inputs, isa)
            made.append(Row("fewbit", spelling, (format.levels - 1).bit_length(), activation, make))
    return made
