# SPDX-License-Identifier: Apache-2.0
"""Our own kernels, as rows beside the others. Codes are random, scales as a quantized normal weight has them."""

from __future__ import annotations

import functools

import torch

from fewbit import formats, kernels
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import FewbitError
from peers.row import SAMPLE, Prepared, Problem, Row, Unavailable, rotated

FLOAT = "float32"
DTYPES = {FLOAT: torch.float32, "bfloat16": torch.bfloat16}
"""Of activations that stay float."""
INTEGERS = {"avx512": "avx512vnni"}
"""The instruction set that multiplies integers where another name was asked for."""


def random(format: Format, shape: tuple[int, int]) -> QTensor:
    rows, columns = F.code_shape(format, shape)
    codes = torch.randint(0, format.levels, (rows, columns)).to(F.code_dtype(format))
    blocks = B.count(columns, format.block)
    params = {}
    for param in format.params:
        if param.entry:
            books = torch.randn(1, blocks, 1, *param.entry)
            books = books.half() if param.dtype == torch.float16 else (40 * books).clamp(-127, 127).to(param.dtype)
            params[param.name] = books.expand(rows, *books.shape[1:])
        elif param.name == "table_scale":
            params[param.name] = torch.full((1, blocks, 1), 0.025).half().expand(rows, blocks, 1)
        elif param.name == "scale":
            params[param.name] = (torch.rand(rows, blocks, 1) + 0.5).half() / format.levels
        else:
            params[param.name] = torch.randint(0, format.levels, (rows, blocks, 1), dtype=torch.uint8)
    return QTensor.of(format, codes, params, rows=shape[0])


def _kernel(format: Format, activation: Format | None, isa: str | None, shape: tuple[int, int]) -> str:
    """The best row, on ``isa`` where that is given."""
    wanted = {isa, INTEGERS.get(str(isa))}
    taken = [row.name for row in kernels.KERNELS if row.isa in wanted and row.refuse(format, shape, activation) is None]
    if isa and not taken:
        raise Unavailable(f"no row of {isa} runs it")
    name = taken[0] if isa else kernels.choose(format, shape, activation=activation).name
    if activation and not kernels.table.named(name).integers:
        raise Unavailable(f"no row multiplies it by {activation.name} as integers; {name} would round x first")
    return name


def prepare(
    format: Format, activation: Format | None, dtype: torch.dtype, isa: str | None, problem: Problem
) -> Prepared:
    name = _kernel(format, activation, isa, problem.shape)
    matrix = random(format, problem.shape)
    codes, params = matrix.logical()
    first_codes = torch.arange(-(-SAMPLE // format.height))
    few = QTensor.of(format, codes[first_codes], F.params_of_rows(format, params, first_codes), rows=SAMPLE)
    try:
        first = kernels.prepare(matrix, name, activation)
    except FewbitError as error:
        raise Unavailable(str(error)) from error
    again = functools.partial(kernels.prepare, matrix, first.kernel, activation)
    x = problem.x.to(dtype)
    calls = rotated(problem, first.read_bytes, lambda: functools.partial(again(), x))
    return Prepared(first.kernel, first.read_bytes, calls, first(x).float(), few.dequantize())


def rows(spellings: list[str], activations: list[str], isa: str | None) -> list[Row]:
    """Every format with every activation format; ``isa`` forces an instruction set."""
    made = []
    for activation in activations:
        inputs = None if activation in DTYPES else formats.parse(activation)
        for spelling in spellings:
            format = formats.parse(spelling)
            make = functools.partial(prepare, format, inputs, DTYPES.get(activation, torch.float32), isa)
            codes = (format.levels - 1).bit_length() / (format.dim * format.height)
            made.append(Row("fewbit", spelling, codes, activation, make))
    return made
