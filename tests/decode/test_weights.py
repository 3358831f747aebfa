# SPDX-License-Identifier: Apache-2.0
"""Weights of every kind as the native runtime multiplies them, against the Python path over the same kernels: bit for
bit, as neither depends on how many tokens come together. (The Python path hands 48 tokens and more to torch.)"""

from __future__ import annotations

import ctypes as C

import pytest
import torch
from torch import Tensor

from fewbit import formats, kernels, methods
from fewbit.core import format as F
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.decode.weights import Builder
from fewbit.errors import UnsupportedError
from fewbit.formats.vector import Vector
from fewbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

ROWS, COLUMNS, RANK = 51, 96, 37


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(format: str, rows: int = ROWS, columns: int = COLUMNS) -> QTensor:
    parsed = formats.parse(format)
    if not isinstance(parsed, Vector):
        return methods.rtn(random(rows, columns, seed=rows + columns), parsed)
    few, wide = F.code_shape(parsed, (rows, columns))
    codes = torch.randint(0, parsed.levels, (few, wide), generator=torch.Generator().manual_seed(1))
    books = {param.name: random(1, *param.entry, seed=param.bits).half() for param in parsed.params}
    params = {name: book[None, :, None].expand(few, *[-1] * 4) for name, book in books.items()}
    return QTensor.of(parsed, codes.to(F.code_dtype(parsed)), params, rows=rows)


def entries(rows: int = ROWS, columns: int = COLUMNS) -> Sparse:
    return Sparse.of(random(rows, columns, seed=2).where(random(rows, columns, seed=3) > 1.5, 0.0))


def scaled(*terms: Term, columns: int = COLUMNS) -> Terms:
    return Terms((ROWS, columns), terms, random(ROWS, seed=4).half(), random(columns, seed=5).bfloat16())


def product(middle: Tensor | None) -> Product:
    return Product(matrix("sign/channel", ROWS, RANK), middle, matrix("sign/channel", RANK, COLUMNS))


def columns(inner: Term) -> Columns:
    """Columns of four kinds: the last part is a sum under scales, which joins what is already there."""
    parts = (Dense(matrix("int4/g32", columns=32)), entries(columns=9), Dense(matrix("sign/channel", columns=7)), inner)
    width = sum(part.shape[1] for part in parts)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(6)).to(torch.uint16)
    return Columns(order, parts)


def sums() -> dict[str, Terms]:
    shape = (ROWS, COLUMNS)
    inside = columns(scaled(Dense(matrix("int2/g16/asym")), entries()))
    return {
        "one matrix": Terms(shape, (Dense(matrix("nf4/g32")),)),
        "signs under scales": scaled(Dense(matrix("sign/channel"))),
        "three of one kernel": Terms(
            shape, (entries(), *(Dense(matrix(f"int{bits}/g32")) for bits in (2, 4, 2)), Dense(matrix("nf4/g32")))
        ),
        "two more onto one": Terms(
            shape, (Dense(matrix("nf4/g32")), Terms(shape, (Dense(matrix("int4/g32")), Dense(matrix("int2/g32")))))
        ),
        "product": Terms(shape, (product(None),)),
        "scaled products": scaled(product(random(RANK, seed=7).half()), product(None), Dense(matrix("ternary/g32"))),
        "sparse alone": Terms(shape, (entries(),)),
        "dense and sparse": Terms(shape, (entries(), Dense(matrix("palette3/rows32")))),
        "columns": Terms(inside.shape, (inside,), random(ROWS, seed=8)),
        "a sum of sums": Terms(shape, (Dense(matrix("int3/g32")), scaled(product(None), entries()))),
        "vectors": scaled(Dense(matrix("vector4x6+5"))),
    }


def multiplied(weight: QTensor | Terms, activation: Format | None, x: Tensor, bias: Tensor | None) -> Tensor:
    build = Builder("a layer", activation)
    made = build.weight(weight, bias)
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan)
    isa = native.FLAGS[native.isas()[0]]
    native.core().weight_multiply(C.addressof(made), x.data_ptr(), x.shape[0], y.data_ptr(), isa, 2)
    return y


def check(weight: QTensor | Terms, activation: str | None, odd: bool = False) -> None:
    rounding = None if activation is None else formats.parse(activation)
    x, bias = 2 * random(30, weight.shape[1], seed=9), random(ROWS, seed=10)
    if odd:
        x[3, 5], x[4, 7], x[5, 2], x[6, 9] = 40.0, -9.0, torch.nan, torch.inf
    prepared = kernels.prepare(weight, activation=rounding)
    for tokens in (x[:1], x[3:4], x):
        for addend in (None, bias):
            found, expected = multiplied(weight, rounding, tokens, addend), prepared(tokens, addend)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", list(sums()))
@pytest.mark.parametrize("activation", [None, "int8/channel", "int8/static/asym/s0.05/z131"])
def test_sums(kind: str, activation: str | None) -> None:
    check(sums()[kind], activation)


ROUNDED = [
    ("int4/g32", "int8/static/asym/s0.05/z131"),  # by the kernel
    ("nf4/g32", "int8/static/sym/s0.05"),
    ("int4/g32", "int4/static/asym/s0.4/z7"),  # beforehand
    ("palette3/row", "int8/static/asym/s0.05/z100"),
    ("int4/g32", "int4/channel/sym/clip0.9"),
    ("int4/g32", "int5/g40/asym/clip0.8"),
    ("int4/g32", "int8/g16"),
    ("sign/channel", "sign/channel"),
    ("int8/channel", "int8/channel/outliers6"),
    ("int4/g32", "int8/g32/outliers5"),
    ("palette3/row", "int8/channel"),
    ("palette3/row", None),
    ("vector6x8", "int8/channel"),
    ("vector6x9", "int8/channel"),
    ("vector4x6+5", "int8/static/asym/s0.05/z131"),
    ("vector4x12", None),
]


@pytest.mark.parametrize(("format", "activation"), ROUNDED)
def test_inputs_of_one_matrix(format: str, activation: str | None) -> None:
    check(matrix(format), activation, odd=True)


def test_bytes_that_a_token_reads() -> None:
    """Those of the Python path, whose orders of columns take 8 bytes each and not 4."""
    for kind, weight in sums().items():
        build = Builder("a layer", None)
        build.weight(weight)
        more = 4 * weight.shape[1] if kind == "columns" else 0
        assert build.read_bytes == kernels.prepare(weight).read_bytes - more


def test_what_no_kernel_rounds_to() -> None:
    with pytest.raises(UnsupportedError, match="no kernel multiplies int4/g32/sym by nf4/g32"):
        Builder("a layer", formats.parse("nf4/g32")).weight(matrix("int4/g32"))
