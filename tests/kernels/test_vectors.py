# SPDX-License-Identifier: Apache-2.0
"""Kernels of vectors: every length, width of index and residual within the bound; their layout; wrong bytes refused.
(Sizes, dtypes, strides, threads, copies and gradients: the tests of all rows.)"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import HERE, there_and_back, vectors
from raw_format import exact

from fewbit import formats, kernels, layouts
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, UnsupportedError
from fewbit.formats.vector import LENGTHS, Vector
from fewbit.kernels import COLUMN8, column8, native
from fewbit.kernels.decoded import DECODED

ROWS = [row.name for row in HERE if row.family == "vector"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_and_width(length: int) -> None:
    for bits in (4, 5, 6, 7, 8, 9, 11, 12, 14, 15, 16):
        for residual in (0, 4, 7, 8) if bits < 13 else (0,):
            shapes = ((1, 1, 0, 1), (length + 1, 33, 8, 3), (131, 70, 0, 9), (64, 33, 32, 2))
            # with some residual every width meets every shape
            for rows, columns, block, batch in shapes if bits > 12 else shapes[(bits + residual // 4) % 2 :: 2]:
                if bits > 12 and block:
                    continue  # books that only take time
                matrix = vectors(Vector(length, bits, residual, block), (rows, columns), generator(bits))
                x = torch.randn(batch, columns, generator=generator(columns))
                answer, bound = exact(matrix).answer(x, None)
                for kernel in ROWS:
                    error = (kernels.prepare(matrix, kernel)(x).double() - answer).abs()
                    assert bool((error <= bound).all()), (kernel, matrix.format.name, rows, columns)


@pytest.mark.parametrize("kernel", ROWS)
def test_indices_of_fewer_than_four_bits(kernel: str) -> None:
    """They take four in memory; what they stand for, and what is stored, stays."""
    for bits, residual in ((1, 0), (2, 0), (3, 0), (3, 2), (1, 5), (9, 3)):
        for length, shape, block in ((2, (131, 70), 0), (4, (37, 33), 8), (12, (25, 40), 0)):
            format = formats.parse(Vector(length, bits, residual, block).name)
            assert isinstance(format, Vector)
            matrix = vectors(format, shape, generator(bits))
            stored = matrix.repack(layouts.DENSE)
            assert stored.packed.shape[-1] == -(-shape[1] * (bits + residual) // 8)
            again = matrix.repack(COLUMN8).repack(layouts.DENSE)
            assert torch.equal(again.packed, stored.packed)
            ready, x = kernels.prepare(stored, kernel), torch.randn(5, shape[1], generator=generator(1))
            answer, bound = exact(matrix).answer(x, None)
            assert bool(((ready(x).double() - answer).abs() <= bound).all()), (format.name, shape)
            assert torch.equal(torch.cat([weight.clone() for _, weight in ready.decoded()]), matrix.dequantize())


@pytest.mark.parametrize("kernel", ROWS)
def test_tokens_give_the_same_bits_in_any_company(kernel: str) -> None:
    matrix = kernels.prepare(vectors(Vector(8, 9, 5), (70, 97), generator(1)), kernel)
    x = torch.randn(DECODED - 1, 97, generator=generator(2))
    alone = torch.cat([matrix(token) for token in x.split(1)])
    for tokens in (1, 2, 3, 4, 5, 8, 9, 33, DECODED - 1):
        assert torch.equal(matrix(x[:tokens]), alone[:tokens])


@pytest.mark.parametrize("kernel", ROWS)
def test_long_batches_and_decoded_weights(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = vectors(Vector(6, 10, 4, 16), (211, 40), generator(3))
    ready = kernels.prepare(matrix, kernel)
    for strip in (1, 40 * 100, 1 << 19):
        monkeypatch.setattr("fewbit.kernels.decoded.STRIP", strip)
        parts = [weight.clone() for _, weight in ready.decoded()]
        assert torch.equal(torch.cat(parts), matrix.dequantize())
    x, bias = torch.randn(DECODED, 40, generator=generator(4)), torch.randn(211, generator=generator(5))
    expected = replace(exact(matrix), operations=40 + 12)  # torch's order of sums
    answer, bound = expected.answer(x, bias)
    assert bool(((ready(x, bias).double() - answer).abs() <= bound).all())


def test_instruction_sets_agree_with_the_reference_on_every_example() -> None:
    for name in (name for name in formats.EXAMPLES if formats.parse(name).height > 1):
        matrix = vectors(formats.parse(name), (35, 128), generator(6))  # type: ignore[arg-type]
        assert kernels.choose(matrix.format, matrix.shape).name == (ROWS[0] if native.available() else "reference")
        assert kernels.table.family(matrix.format) == "vector"


@pytest.mark.parametrize("shape", [(1, 1), (7, 31), (64, 33), (131, 8)])
@pytest.mark.parametrize("name", ["vector8x12", "vector2x4", "vector6x7+9/g8", "vector16x16+8"])
def test_the_layout_as_drawn_and_back(name: str, shape: tuple[int, int]) -> None:
    format = formats.parse(name)
    assert isinstance(format, Vector)
    matrix = vectors(format, shape, generator(7))
    packed = there_and_back(matrix, COLUMN8)
    rows, columns = F.code_shape(format, shape)
    assert packed.packed.shape == (-(-rows // 8), columns * format.bits) and packed.packed.dtype == torch.uint8
    for row in range(0, rows, 3):
        for column in range(0, columns, 7):
            chunk = packed.packed[row // 8, column * format.bits : (column + 1) * format.bits].tolist()
            code, base = 0, 0
            for bits in format.fields.values():
                whole = int.from_bytes(bytes(chunk[base : base + bits]), "little")
                code |= (whole >> row % 8 * bits & (2**bits - 1)) << base
                base += bits
            assert code == int(matrix.packed[row, column])


JOINT = [(4, 4, 0), (6, 6, 0), (5, 4, 32), (8, 4, 0), (1, 1, 0), (3, 9, 33)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kernel", ROWS)
def test_two_books_read_as_one_give_the_same_bits(kernel: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, residual, block in JOINT:
        for shape, tokens in (((1, 33), 1), ((8 * length + 3, 70), 1), ((131, 97), 9), ((64, 40), DECODED)):
            matrix = vectors(Vector(length, bits, residual, block), shape, generator(bits))
            x = torch.randn(tokens, shape[1], generator=generator(2))
            bias = torch.randn(shape[0], generator=generator(3))
            monkeypatch.setattr(column8, "JOINT_CODES", 1 << 40)
            apart = kernels.prepare(matrix, kernel)
            expected, weight = apart(x, bias), torch.cat([part.clone() for _, part in apart.decoded()])
            monkeypatch.setattr(column8, "JOINT_CODES", 0)
            ready = kernels.prepare(matrix, kernel)
            assert ready.qtensor().packed.shape[1] == shape[1] * max(4, bits + residual)
            assert torch.equal(ready(x, bias), expected), (matrix.format.name, shape)
            assert torch.equal(torch.cat([part.clone() for _, part in ready.decoded()]), weight)
            assert torch.equal(weight, matrix.dequantize())
            there_and_back(matrix, COLUMN8)


def test_two_books_are_one_where_codes_outweigh_their_sums() -> None:
    assert column8.joint(Vector(8, 6, 6), (4096, 1024)) and not column8.joint(Vector(8, 6, 6), (4088, 1024))
    assert column8.joint(Vector(8, 6, 6, 512), (8192, 4096)) and not column8.joint(Vector(8, 6, 6, 512), (8192, 511))
    assert not column8.joint(Vector(8, 7, 6), (1 << 16, 4096)) and not column8.joint(Vector(8, 12), (1 << 16, 4096))


def test_a_layout_of_other_bytes_is_refused() -> None:
    matrix = vectors(Vector(8, 6), (64, 40), generator(8)).repack(COLUMN8)
    good = {"packed": matrix.packed, "params": dict(matrix.params)}
    for change in (
        {"packed": matrix.packed[:, :-1]},
        {"packed": torch.cat([matrix.packed, matrix.packed])},
        {"packed": matrix.packed.int()},
        {"params": {"codebook": matrix.params["codebook"][:, :-1]}},  # an index past it would be read
        {"params": {"codebook": matrix.params["codebook"][..., :-1]}},
        {"params": {}},
    ):
        with pytest.raises(InputError):
            kernels.prepare(QTensor(matrix.format, COLUMN8, matrix.shape, **(good | change)))  # type: ignore[arg-type]
    assert "something else" in str(COLUMN8.refuse(formats.parse("int4/g64"), (64, 64)))


def test_any_bytes_are_codes() -> None:
    """An index is cut out of its bits, so no byte leads past a book."""
    format = Vector(8, 5, 4)
    matrix = vectors(format, (64, 40), generator(9)).repack(COLUMN8)
    broken = replace(matrix, packed=torch.full_like(matrix.packed, 255))
    assert int(broken.logical()[0].max()) == format.levels - 1
    x = torch.randn(1, 40, generator=generator(10))
    for kernel in ROWS:
        assert bool(kernels.linear(x, broken, kernel=kernel).isfinite().all())


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_codes_at_odd_addresses() -> None:
    matrix = vectors(Vector(8, 12), (64, 40), generator(11)).repack(COLUMN8)
    store = torch.zeros(matrix.packed.numel() + 3, dtype=torch.uint8)
    odd = store[3:].reshape(matrix.packed.shape)
    odd.copy_(matrix.packed)
    assert odd.data_ptr() % 8
    x = torch.randn(3, 40, generator=generator(12))
    for kernel in ROWS:
        assert torch.equal(
            kernels.linear(x, replace(matrix, packed=odd), kernel=kernel), kernels.linear(x, matrix, kernel=kernel)
        )


def test_activations_are_not_vectors() -> None:
    with pytest.raises(UnsupportedError, match="8 tokens"):
        kernels.choose(formats.parse("int4/g64"), (64, 64), activation=formats.parse("vector8x8"))
