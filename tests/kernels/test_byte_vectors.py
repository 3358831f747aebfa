# SPDX-License-Identifier: Apache-2.0
"""Kernels of vectors of bytes: what books become, within the stated bound; their layout; which row is chosen.
(Sizes, dtypes, strides, threads, copies and gradients: the tests of all rows.)"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import HERE, there_and_back, vectors
from raw_format import exact
from torch.nn.functional import pad

from fewbit import formats, kernels
from fewbit.core import format as F
from fewbit.core.format import Vectors
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, UnsupportedError
from fewbit.formats.vector import LENGTHS, Vector
from fewbit.kernels import VECTOR16, native
from fewbit.kernels.byte_vectors import to_bytes

ROWS = [row.name for row in HERE if row.family == "int8_vector"]
INT8 = formats.parse("int8/channel")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SMALL = [(bits, residual) for bits in range(4, 9) for residual in (0, 4, 6, 7, 8)]
WIDE = [(9, 0), (10, 4), (11, 8), (12, 0), (13, 0), (6, 9), (14, 10), (15, 0), (16, 0)]


def check(matrix: QTensor, tokens: int) -> None:
    x = torch.randn(tokens, matrix.shape[1], generator=generator(matrix.shape[1]))
    answer, bound = exact(matrix).answer(kernels.reference.round_activations(x, INT8), None, 1 / 255 + 2.0**-16)
    for kernel in ROWS:
        y = kernels.prepare(matrix, kernel, INT8)(x)
        assert bool(((y.double() - answer).abs() <= bound).all()), (kernel, matrix.format.name, matrix.shape)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_width(length: int) -> None:
    for bits, residual in SMALL:
        for rows, columns, block, tokens in ((1, 1, 0, 1), (length + 1, 33, 32, 3), (131, 320, 64, 2)):
            check(vectors(Vector(length, bits, residual, block), (rows, columns), generator(bits)), tokens)
    for bits, residual in WIDE:
        for rows, columns, block, tokens in ((1, 1, 0, 1), (length + 1, 70, 32, 5), (37, 100, 0, 17)):
            check(vectors(Vector(length, bits, residual, block), (rows, columns), generator(bits)), tokens)


@pytest.mark.parametrize("kernel", ROWS)
def test_indices_of_fewer_than_four_bits(kernel: str) -> None:
    for bits, residual in ((1, 0), (2, 0), (3, 0), (3, 2), (1, 5), (8, 2)):
        for length, shape, block in ((2, (131, 320), 64), (4, (37, 33), 32), (12, (25, 40), 0)):
            matrix = vectors(Vector(length, bits, residual, block), shape, generator(bits))
            rounded = kernels.reference.round_activations(x := torch.randn(5, shape[1], generator=generator(1)), INT8)
            answer, bound = exact(matrix).answer(rounded, None, 1 / 255 + 2.0**-16)
            ready = kernels.prepare(matrix, kernel, INT8)
            assert bool(((ready(x).double() - answer).abs() <= bound).all()), (matrix.format.name, shape)
            assert torch.equal(ready.weight().dequantize(), matrix.dequantize())


@pytest.mark.parametrize("kind", ["random", "constant", "far from zero", "tie"])
def test_bytes_of_books(kind: str) -> None:
    """Every sum of entries is within half a step a book, and no sum of bytes passes 255."""
    for bits in ((6,), (6, 6), (4, 5), (8, 4), (8,), (9,), (10, 4), (7, 11)):
        books = tuple(torch.randn(3, 1 << b, 8, generator=generator(b)).half().float() for b in bits)
        if kind == "constant":
            books = tuple(torch.full_like(book, 0.3) for book in books)
        if kind == "far from zero":
            books = tuple(book / 64 + 1000 for book in books)
        if kind == "tie":  # both ranges end in half a step
            books = tuple(torch.linspace(0, 127.5, 1 << b).reshape(1, -1, 1).expand(3, -1, 8) for b in bits)
        found, step, offset = to_bytes(Vectors(books, bits))
        assert found.dtype == torch.uint8
        if max(bits) > 8:
            sizes = [max(256, 1 << b) for b in bits]
            assert found.shape == (3, sum(sizes), 8)
            zeros = [book[:, 1 << b :] for book, b in zip(found.split(sizes, 1), bits, strict=True)]
            assert not any(bool(rest.any()) for rest in zeros)
            widest = max(sizes)
            found = torch.stack([pad(f, (0, 0, 0, widest - f.shape[1])) for f in found.split(sizes, 1)], 1).mT
        else:
            assert found.shape == (3, len(bits), 8, 64 if max(bits) <= 6 else 256)
        assert int(found.int().amax(3).sum(1).max()) <= 255
        ranges = sum((book.double().amax(1) - book.double().amin(1) for book in books), torch.zeros(()))
        assert bool(((step.double() - ranges / 255).abs() <= 2.0**-23 * ranges).all())
        lowest = torch.stack([book.double().amin(1) for book in books], 1)
        for i, book in enumerate(books):
            entries = lowest[:, i, :, None] + step.double()[:, :, None] * found[:, i, :, : book.shape[1]].double()
            error = (entries - book.double().transpose(1, 2)).abs()
            assert bool((error <= 0.5 * step.double()[:, :, None] * (1 + 2.0**-12)).all())
            if max(bits) <= 8:
                assert torch.equal(found[:, i], found[:, i, :, : book.shape[1]].repeat(1, 1, found.shape[3] >> bits[i]))
        assert torch.equal(offset, lowest.sum(1).float())


@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (64, 33), (131, 8)])
@pytest.mark.parametrize("name", ["vector8x6+6", "vector2x4", "vector6x7+5/g32", "vector4x6+5", "vector16x8"])
def test_the_layout_as_drawn_and_back(name: str, shape: tuple[int, int]) -> None:
    format = formats.parse(name)
    assert isinstance(format, Vector)
    matrix = vectors(format, shape, generator(7))
    packed = there_and_back(matrix, VECTOR16)
    rows, columns = F.code_shape(format, shape)
    chunk = format.bits * 64
    assert packed.packed.shape == (-(-rows // 16), -(-columns // 32) * chunk)
    for row in range(0, rows, 3):
        for column in range(0, columns, 5):
            here = packed.packed[row // 16, column // 32 * chunk :][:chunk].reshape(format.bits, 16, 4)
            group, byte, code, base = column % 32 // 4, column % 4, 0, 0
            for bits in format.fields.values():
                index = low = 0
                if bits == 6:
                    spare = here[base + (group - 6) * 3 :, row % 16, byte].tolist()
                    six = [int(here[base + group, row % 16, byte]) & 63] if group < 6 else [b >> 6 for b in spare[:3]]
                    index = sum(part << 2 * i for i, part in enumerate(six))
                for width in (width for width in (8, 4, 2, 1) if bits & width and bits != 6):
                    field = int(here[base + low + group * width // 8, row % 16, byte]) >> group * width % 8
                    index, low = index | (field & (2**width - 1)) << low, low + width
                code, base = code | index << base, base + bits
            assert code == int(matrix.packed[row, column])


@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (300, 33), (131, 8)])
@pytest.mark.parametrize("name", ["vector8x12", "vector4x13+5/g32", "vector16x7+9"])
def test_the_layout_of_large_books_as_drawn_and_back(name: str, shape: tuple[int, int]) -> None:
    format = formats.parse(name)
    assert isinstance(format, Vector)
    matrix = vectors(format, shape, generator(7))
    packed = there_and_back(matrix, VECTOR16)
    rows, columns = F.code_shape(format, shape)
    chunks, widths = -(-columns // 32), [max(8, bits) for bits in format.fields.values()]
    assert packed.packed.shape == (-(-rows // 16), chunks * sum(widths) * 64)
    strings = packed.packed.reshape(-1, chunks, sum(widths) * 4)
    assert not strings[rows:].any()
    for row in range(0, rows, 5):
        for column in range(0, columns, 3):
            whole = int.from_bytes(bytes(strings[row, column // 32].tolist()), "little")
            code = base = at = 0
            for bits, width in zip(format.fields.values(), widths, strict=True):
                index = whole >> at + column % 32 * width & (1 << width) - 1
                code, base, at = code | index << base, base + bits, at + 32 * width
            assert code == int(matrix.packed[row, column])


def test_a_layout_of_other_bytes_is_refused() -> None:
    matrix = vectors(Vector(8, 6), (64, 40), generator(8)).repack(VECTOR16)
    good = {"packed": matrix.packed, "params": dict(matrix.params)}
    for change in (
        {"packed": matrix.packed[:, :-1]},
        {"packed": torch.cat([matrix.packed, matrix.packed])},
        {"packed": matrix.packed.int()},
        {"params": {"codebook": matrix.params["codebook"][:, :-1]}},
        {"params": {}},
    ):
        with pytest.raises(InputError):
            kernels.prepare(QTensor(matrix.format, VECTOR16, matrix.shape, **(good | change)), None, INT8)  # type: ignore[arg-type]
    assert "something else" in str(VECTOR16.refuse(formats.parse("int4/g64"), (64, 64)))


@pytest.mark.skipif("avx2" not in native.isas(), reason="this machine has no AVX2")
def test_which_row_is_chosen() -> None:
    best = f"int8_vector_linear_{'avx512vbmi' if 'avx512vbmi' in native.isas() else 'avx2'}"
    floats = f"vector_linear_{'avx512' if 'avx512' in native.isas() else 'avx2'}"
    for name in ("vector8x6+6", "vector8x8", "vector4x6", "vector8x4+4", "vector8x12", "vector6x9+8/g32"):
        assert kernels.choose(formats.parse(name), (64, 256), activation=INT8).name == best
        assert kernels.choose(formats.parse(name), (64, 256)).name == floats
    for name, reason in (("vector8x12/g48", "whole chunks"), ("vector8x6/g48", "whole chunks")):
        choice = kernels.choose(formats.parse(name), (64, 256), activation=INT8)
        assert choice.kernel.family != "int8_vector" and reason in choice.reasons[best]
    with pytest.raises(UnsupportedError, match="stay float"):
        kernels.choose(formats.parse("vector8x8"), (64, 256), "int8_vector_linear_serial")


@pytest.mark.parametrize("kernel", ROWS)
@pytest.mark.parametrize("bits", [(6, 4), (11, 9)])
def test_codes_at_odd_addresses(kernel: str, bits: tuple[int, int]) -> None:
    matrix = vectors(Vector(8, *bits), (64, 40), generator(11)).repack(VECTOR16)
    store = torch.zeros(matrix.packed.numel() + 3, dtype=torch.uint8)
    odd = store[3:].reshape(matrix.packed.shape)
    odd.copy_(matrix.packed)
    x = torch.randn(3, 40, generator=generator(12))
    found = [kernels.linear(x, m, kernel=kernel, activation=INT8) for m in (matrix, replace(matrix, packed=odd))]
    assert torch.equal(*found)
