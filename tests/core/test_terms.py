# SPDX-License-Identifier: Apache-2.0
"""Terms as data: what they stand for, what they store, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit import formats, layouts
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.errors import InputError


def quantized(rows: int, columns: int, spelling: str = "int4/g32", seed: int = 0) -> QTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    format = formats.parse(spelling).bind(weight)
    params = F.fit(format, weight)
    return QTensor.of(format, F.encode(format, weight, params), params).repack(layouts.DENSE)


def few(rows: int, columns: int, share: float = 0.1, seed: int = 0) -> Tensor:
    """A matrix of zeros but for a ``share`` of its entries, which float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator).half().float()
    return torch.where(torch.rand(rows, columns, generator=generator) < share, values, 0.0)


def stored(*arrays: Tensor) -> int:
    return sum(len(array.numpy().tobytes()) for array in arrays)


@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (33, 97), (300, 1024)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_sparse_entries_are_those_of_the_matrix(shape: tuple[int, int], share: float) -> None:
    matrix = few(*shape, share)
    sparse = Sparse.of(matrix)
    assert torch.equal(sparse.dequantize(), matrix)
    entries = int((matrix != 0).sum())
    assert sparse.nbytes == 4 * (shape[0] + 1) + 4 * entries
    assert sparse.bits_per_weight == pytest.approx(8 * sparse.nbytes / matrix.numel())
    assert torch.equal(Sparse.of(matrix, torch.float32).dequantize(), matrix)


def test_entries_come_in_any_order_and_wide_matrices_take_wider_columns() -> None:
    rows, columns = torch.tensor([2, 0, 2, 0]), torch.tensor([70_000, 5, 3, 65_535])
    sparse = Sparse.at((3, 70_001), rows, columns, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert sparse.pointers.tolist() == [0, 2, 2, 4]
    assert sparse.columns.tolist() == [5, 65_535, 3, 70_000] and sparse.columns.dtype == torch.int32
    assert sparse.values.tolist() == [2, 4, 3, 1]
    narrow = Sparse.at((3, 1 << 16), rows[1:], columns[1:], torch.ones(3))
    assert narrow.columns.dtype == torch.uint16 and narrow.columns.long().tolist() == [5, 65_535, 3]


@pytest.mark.parametrize(
    ("rows", "columns", "values", "reason"),
    [
        ([0, 0], [3, 3], [1.0, 2.0], "row 0 has a column twice"),
        ([3], [0], [1.0], "rows go from 3 to 3; 0 to 2"),
        ([-1], [0], [1.0], "rows go from -1"),
        ([0], [8], [1.0], "columns go from 8 to 8; 0 to 7"),
        ([0], [-1], [1.0], "columns go from -1"),
        ([0], [65_536 + 3], [1.0], "columns go from 65539"),
        ([0], [0], [1e5], "not finite in torch.float16"),
        ([0], [0], [float("nan")], "not finite"),
    ],
)
def test_entries_that_make_no_matrix_are_refused(
    rows: list[int], columns: list[int], values: list[float], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        Sparse.at((3, 8), torch.tensor(rows), torch.tensor(columns), torch.tensor(values))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pointers": torch.tensor([0, 2, 1, 3], dtype=torch.int32)}, "never falling"),
        ({"pointers": torch.tensor([1, 2, 2, 3], dtype=torch.int32)}, "pointers go from 1"),
        ({"pointers": torch.tensor([0, 2, 2, 4], dtype=torch.int32)}, "to 4"),
        ({"pointers": torch.tensor([0, 2, 2, 2], dtype=torch.int32)}, "to 2"),
        ({"pointers": torch.tensor([0, 2, 3], dtype=torch.int32)}, "3 pointers"),
        ({"pointers": torch.tensor([0.0, 2.0, 2.0, 3.0])}, "pointers are torch.float32"),
        ({"columns": torch.tensor([4, 1, 0], dtype=torch.uint16)}, "row 0 has a column twice, or out of order"),
        ({"columns": torch.tensor([4, 4, 0], dtype=torch.uint16)}, "row 0 has a column twice"),
        ({"columns": torch.tensor([1, 8, 0], dtype=torch.uint16)}, "columns go from 0 to 8"),
        ({"columns": torch.tensor([-1, 4, 0], dtype=torch.int32)}, "columns go from -1"),
        ({"columns": torch.tensor([1, 4, 0], dtype=torch.int64)}, "columns are torch.int64"),
        ({"columns": torch.tensor([1, 4], dtype=torch.uint16)}, "2 columns and 3 values"),
        ({"values": torch.tensor([[1.0, 2.0, 3.0]])}, r"values are torch.float32 \(1, 3\)"),
        ({"values": torch.tensor([1.0, float("inf"), 3.0])}, "not finite"),
        ({"values": torch.tensor([1, 2, 3])}, "values are torch.int64"),
        ({"shape": (3, 70_000)}, "columns are torch.uint16"),
        ({"shape": (0, 8), "pointers": torch.tensor([3], dtype=torch.int32)}, "1 pointers"),
    ],
)
def test_a_corrupt_array_is_refused(change: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {
        "shape": (3, 8),
        "pointers": torch.tensor([0, 2, 2, 3], dtype=torch.int32),
        "columns": torch.tensor([1, 4, 0], dtype=torch.uint16),
        "values": torch.tensor([1.0, 2.0, 3.0]),
    }
    assert Sparse(**good).rows().tolist() == [0, 0, 2]
    with pytest.raises(InputError, match=reason):
        Sparse(**good | change)


def test_each_term_stands_for_its_formula_and_counts_its_bytes() -> None:
    dense, sparse = Dense(quantized(6, 64)), Sparse.of(few(6, 64))
    left, right, middle = quantized(6, 32, "sign/channel"), quantized(32, 64, "sign/channel", 1), torch.rand(32).half()
    product, plain = Product(left, middle, right), Product(left, None, right)
    exact = left.dequantize().double() @ torch.diag(middle.double()) @ right.dequantize().double()
    torch.testing.assert_close(product.dequantize().double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(plain.dequantize(), left.dequantize() @ right.dequantize())
    assert product.shape == plain.shape == (6, 64)
    assert product.nbytes == plain.nbytes + 64 == left.nbytes + right.nbytes + 64

    order = torch.randperm(128, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    columns = Columns(order, (dense, product))
    beside = torch.cat([dense.dequantize(), product.dequantize()], 1)
    assert torch.equal(columns.dequantize()[:, order.long()], beside)
    assert columns.nbytes == 4 * 128 + dense.nbytes + product.nbytes

    row_scale, column_scale = torch.randn(6), torch.randn(64).bfloat16()
    terms = Terms((6, 64), (dense, sparse), row_scale, column_scale)
    expected = (dense.dequantize() + sparse.dequantize()) * row_scale[:, None] * column_scale.float()
    assert torch.equal(terms.dequantize(), expected)
    assert terms.nbytes == dense.nbytes + sparse.nbytes + 24 + 128
    assert dense.nbytes == stored(dense.qtensor.packed, *dense.qtensor.params.values())
    assert torch.equal(Terms((6, 64), (terms, dense)).dequantize(), expected + dense.dequantize())


def refused() -> list[tuple[Any, str]]:
    small, wide = Dense(quantized(6, 64)), Dense(quantized(6, 32))
    tall = quantized(32, 64, seed=1)
    made: list[tuple[Any, str]] = [
        (lambda: Product(small.qtensor, None, tall), "a right factor of 64 rows"),
        (lambda: Product(wide.qtensor, torch.ones(31), tall), r"middle of a product of 32; .* \(31,\)"),
        (lambda: Product(wide.qtensor, torch.full((32,), torch.nan), tall), "NaN or infinity"),
        (lambda: Terms((6, 64), ()), "one or more"),
        (lambda: Terms((6, 64), (small, wide)), r"\(6, 32\)"),
        (lambda: Terms((6, 64), (small,), torch.ones(5)), "row scale of 6"),
        (lambda: Terms((6, 64), (small,), None, torch.ones(64).long()), "column scale of 64; found torch.int64"),
        (lambda: Terms((6, 64), (small,), torch.full((6,), torch.inf)), "NaN or infinity"),
        (lambda: Columns(torch.arange(64), ()), "there is none"),
        (lambda: Columns(torch.arange(96), (small, Dense(tall))), "differ in rows"),
        (lambda: Columns(torch.arange(95), (small, wide)), "each of 0 to 95 once"),
        (lambda: Columns(torch.arange(96).clamp(1), (small, wide)), "each of 0 to 95 once"),
        (lambda: Columns(torch.arange(96)[None], (small, wide)), "each of 0 to 95 once"),
        (lambda: Columns(torch.arange(96).float(), (small, wide)), "a permutation in torch.float32"),
    ]
    return made


@pytest.mark.parametrize(("make", "reason"), refused())
def test_terms_that_do_not_fit_together_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make()


def test_terms_are_abstract_or_final_data() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Term()  # type: ignore[abstract]
    with pytest.raises(AttributeError):
        Dense(quantized(2, 32)).qtensor = quantized(2, 32)  # type: ignore[misc]
