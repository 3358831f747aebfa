# SPDX-License-Identifier: Apache-2.0
"""Vectors of a codebook against float64 definitions: decoding, nearest vectors, what the fit must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit import formats, layouts, methods
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor, stack, storage, storage_bytes
from fewbit.errors import SpecError, UnsupportedError
from fewbit.formats.vector import LENGTHS, Vector

NAMES = ("vector2x4", "vector4x5/g16", "vector6x6+5", "vector8x8", "vector8x4+4/g32", "vector12x9", "vector16x4")


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow_values(format: Vector, codes: np.ndarray, params: dict[str, torch.Tensor], rows: int) -> np.ndarray:
    """float64 (rows, columns), weight by weight, from the definition."""
    weight = np.empty((rows, codes.shape[1]))
    books = {name: params[name][0, :, 0].double().numpy() for name in format.fields}
    block = format.block or codes.shape[1]
    for row in range(rows):
        for column in range(codes.shape[1]):
            code, value = int(codes[row // format.length, column]), 0.0
            for name, bits in format.fields.items():
                value += books[name][column // block, code % 2**bits, row % format.length]
                code >>= bits
            weight[row, column] = value
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_values_and_nearest_vectors_by_brute_force(name: str) -> None:
    format = formats.parse(name)
    assert isinstance(format, Vector)
    for rows, columns in ((1, 1), (format.length + 3, 33), (2 * format.length, 40)):
        weight = normal(rows, columns, seed=columns)
        tensor = methods.rtn(weight, format)
        codes, params = tensor.logical()
        values = slow_values(format, codes.numpy(), params, rows)
        bound = 2.0**-24 * np.abs(values)  # float32 adds two halves
        assert tensor.shape == (rows, columns)
        assert bool((np.abs(tensor.dequantize().double().numpy() - values) <= bound).all())
        matrix = weight.double().numpy()
        for column in range(columns):
            block = column // (format.block or columns)
            for unit in range(len(codes)):
                rest = matrix[unit * format.length : (unit + 1) * format.length, column]  # the last may be shorter
                code = int(codes[unit, column])
                for field, bits in format.fields.items():
                    book = params[field][0, block, 0].double().numpy()[:, : len(rest)]
                    distance = ((book - rest) ** 2).sum(1)
                    assert distance[code % 2**bits] <= distance.min() + 1e-6 * (rest**2).sum()
                    rest, code = np.float32(rest - book[code % 2**bits]).astype(float), code >> bits


@pytest.mark.parametrize("name", [name for name in NAMES if "+" not in name])
def test_codes_of_a_matrix_come_back(name: str) -> None:
    format = formats.parse(name)
    tensor = methods.rtn(normal(4 * format.height, 48), format)
    codes, params = tensor.logical()
    assert torch.equal(F.encode(format, tensor.dequantize(), params), codes)


@pytest.mark.parametrize("rows", [60, 12, 3])
def test_a_book_of_more_entries_than_vectors_holds_them_all(rows: int) -> None:
    """Those that the rows do not fill as well."""
    weight = normal(rows, 20)
    error = (F.rounded(formats.parse("vector8x8"), weight) - weight).abs()
    assert bool((error <= 2.0**-11 * weight.abs() + 2.0**-25).all())  # float16


def test_folding_is_undone_and_pads_with_zeros() -> None:
    blocks = B.split(normal(7, 10), 4)
    folded = B.fold(blocks, 3)
    assert folded.shape == (3, 3, 12) and torch.equal(B.unfold(folded, 3)[:7], blocks)
    assert folded[1, 2, 3:6].tolist() == blocks[3:6, 2, 1].tolist()
    assert not bool(B.unfold(folded, 3)[7:].any())


def test_padding_and_unimportant_columns_move_no_vector() -> None:
    format = formats.parse("vector8x6")
    weight = normal(64, 40)
    whole = F.fit(format, weight)["codebook"]
    taller = torch.cat([weight, torch.full((3, 40), 9.0)])  # not a whole code: it is not looked at
    assert torch.equal(F.fit(format, taller)["codebook"][:1], whole[:1])
    wider, worth = torch.cat([weight, torch.full((64, 5), 9.0)], 1), torch.ones(45)
    worth[40:] = 0
    assert torch.equal(F.fit(format, wider, worth)["codebook"], whole)
    assert not torch.equal(F.fit(format, wider)["codebook"], whole)


def test_a_residual_and_more_codebooks_lose_less() -> None:
    weight = normal(96, 512)
    names = ("vector8x4", "vector8x6", "vector8x6/g128", "vector8x6+6", "vector4x6+6")
    lost = [float((methods.rtn(weight, formats.parse(name)).dequantize() - weight).square().sum()) for name in names]
    assert lost == sorted(lost, reverse=True)


def test_the_fit_is_the_same_every_time_and_at_any_thread_count() -> None:
    weight, format = normal(64, 300), formats.parse("vector4x7+5/g128")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4, 1):
            torch.set_num_threads(threads)
            found.append(methods.rtn(weight, format))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.packed, found[0].packed)
        assert all(torch.equal(other.params[name], found[0].params[name]) for name in other.params)


@pytest.mark.parametrize(("name", "bits"), [("vector8x12", 1.5), ("vector6x6+5", 11 / 6), ("vector8x16", 2.0)])
def test_true_bits_count_the_books(name: str, bits: float) -> None:
    format = formats.parse(name)
    assert isinstance(format, Vector)
    rows, columns = 48, 64
    tensor = methods.rtn(normal(rows, columns), format)
    books = sum(16 * format.length << width for width in format.fields.values())
    packed = tensor.repack(layouts.named("dense"))
    assert 8 * packed.nbytes == bits * rows * columns + books
    sizes = storage(format, layouts.named("dense"), (rows, columns))
    assert {key: size for key, (_, size) in sizes.items()} == {
        "packed": tuple(packed.packed.shape), **{key: tuple(value.shape) for key, value in packed.params.items()}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "index", "books"),
    [("vector6x12", 2.0, 0.023), ("vector8x12", 1.5, 0.031), ("vector12x12+12/g1024", 2.0, 0.375)],
)
def test_books_of_a_large_matrix_are_not_negligible(name: str, index: float, books: float) -> None:
    """Of 4096 x 4096 weights; but for the rows that fill the last vectors of a column up."""
    sizes = storage(formats.parse(name), layouts.named("dense"), (4096, 4096))
    assert 8 * storage_bytes(sizes) / 4096**2 == pytest.approx(index + books, abs=0.005)


def test_storage_of_rows_that_are_no_whole_codes() -> None:
    format, dense = formats.parse("vector6x5"), layouts.named("dense")
    assert storage(format, dense, (7, 40))["packed"][1] == (2, 25)
    assert tuple(methods.rtn(normal(7, 40), format).repack(dense).packed.shape) == (2, 25)


def test_spellings() -> None:
    for length in LENGTHS:
        for rest in ("x4", "x16", "x12+12", "x8+8/g128"):
            assert formats.parse(f"vector{length}{rest}").name == f"vector{length}{rest}"
    for wrong in ("vector3x8", "vector8x17", "vector8x8+17", "vector8x16+16"):
        with pytest.raises(SpecError, match="vector8x12"):
            formats.parse(wrong)


def test_matrices_with_books_of_their_own_are_not_stacked() -> None:
    parts = [methods.rtn(normal(8, 16, seed), formats.parse("vector8x4")) for seed in (0, 1)]
    assert stack(parts[:1]) is parts[0]
    with pytest.raises(UnsupportedError, match="share"):
        stack(parts)


def test_codes_of_any_dtype_are_rows_of_a_matrix() -> None:
    format = formats.parse("vector8x12")
    codes = torch.randint(0, 4096, (2, 5), dtype=torch.int32)
    book = normal(4096, 8).half()[None, None, None].expand(2, 1, 1, 4096, 8)
    assert QTensor.of(format, codes, {"codebook": book}).shape == (16, 5)
    assert QTensor.of(format, codes, {"codebook": book}, rows=11).dequantize().shape == (11, 5)
