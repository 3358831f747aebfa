# SPDX-License-Identifier: Apache-2.0
"""Products of two activations: a numpy oracle of the integers, bit for bit on every instruction set, in every memory
order and at any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, kernels
from fewbit.errors import InputError, UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.kernels import native, products, reference

needs_native = pytest.mark.skipif(not native.available(), reason="no native kernels")
GRIDS = [
    ("int8/static/asym/s0.0173/z41", "int8/static/sym/s0.021"),
    ("int8/static/asym/s0.01/z0", "int8/static/asym/s0.02/z255"),
    ("int4/static/sym/s0.3", "int3/static/asym/s0.4/z5"),
    ("int2/static/asym/s0.7/z1", "int7/static/asym/s0.03/z64"),
]
SHAPES = [(1, 1, 1), (7, 31, 33), (64, 5, 64), (64, 64, 10), (97, 33, 7), (300, 2, 65), (5, 97, 31), (33, 7, 97)]


def grids(pair: tuple[str, str]) -> tuple[Fixed, Fixed]:
    left, right = map(formats.parse, pair)
    assert isinstance(left, Fixed) and isinstance(right, Fixed)
    return left, right


def integer_oracle(a: Tensor, b: Tensor, left: Fixed, right: Fixed) -> np.ndarray:
    """Codes of both, and their exact products; float32 only where scales are applied."""

    def centred(x: Tensor, grid: Fixed) -> np.ndarray:
        place = x.float().numpy() / np.float32(grid.scale) + np.float32(grid.zero)
        return np.clip(np.rint(place), 0, (1 << grid.bits) - 1).astype(np.int64) - grid.zero

    whole = centred(a, left) @ centred(b, right)
    scaled: np.ndarray = np.float32(left.scale) * np.float32(right.scale) * whole.astype(np.float32)
    return scaled


def operands(shape: tuple[int, int, int], leading: tuple[int, ...], pair: tuple[Fixed, Fixed]) -> tuple[Tensor, Tensor]:
    """Numbers within the grids, beyond their ends, and halfway between two codes."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, inner, columns = shape
    made = []
    for size, grid in (((rows, inner), pair[0]), ((inner, columns), pair[1])):
        code = torch.randint(-9, grid.levels + 9, (*leading, *size), generator=generator)
        off = torch.rand(code.shape, generator=generator).where(torch.rand(code.shape, generator=generator) < 0.7, 0.5)
        made.append(grid.scale * (code - grid.zero + off))
    return made[0], made[1]


@pytest.mark.parametrize("pair", GRIDS)
def test_every_instruction_set_and_memory_order_gives_the_integers(pair: tuple[str, str]) -> None:
    both = grids(pair)
    for shape in SHAPES:
        for leading in ((), (3,), (2, 3), (2, 1, 2)):
            a, b = operands(shape, leading, both)
            expected = integer_oracle(a, b, *both)
            assert np.array_equal(reference.integer_matmul(a, b, *both).numpy(), expected)
            apart = torch.zeros(*b.shape[:-1], b.shape[-1] + 3)
            apart[..., 1:-2] = b
            for isa in native.isas():
                for x in (a, a.mT.contiguous().mT, torch._neg_view(-a)):
                    for y in (b, b.mT.contiguous().mT, apart[..., 1:-2], b.expand(*b.shape[:-1], -1)):
                        assert np.array_equal(products._run(x, y, *both, isa).numpy(), expected), (shape, leading, isa)


def test_one_matrix_for_many_and_threads_and_short_dtypes() -> None:
    both = grids(GRIDS[0])
    a, b = operands((300, 40, 50), (5,), both)
    expected = integer_oracle(a, b[:1], *both)
    assert np.array_equal(kernels.matmul(a, b[0], *both).numpy(), expected)
    assert np.array_equal(kernels.matmul(a.expand(1, 5, 300, 40), b[:1, None], *both)[0].numpy(), expected[None][0])
    torch.set_num_threads(2)
    assert np.array_equal(kernels.matmul(a, b[0], *both).numpy(), expected)
    for dtype in (torch.bfloat16, torch.float16):
        x, y = a.to(dtype), b.to(dtype)
        found = kernels.matmul(x, y, *both)
        assert found.dtype == dtype
        assert torch.equal(found, torch.from_numpy(integer_oracle(x, y, *both)).to(dtype))
    assert kernels.matmul(a[:0], b[:0], *both).shape == (0, 300, 50)


def test_the_largest_sum_is_exact_and_one_more_is_refused() -> None:
    both = grids(("int8/static/asym/s1/z0", "int8/static/asym/s1/z0"))
    for isa in native.isas():
        a, b = torch.full((2, products.MOST_INNER), 400.0), torch.full((products.MOST_INNER, 3), 300.0)
        found = products._run(a, b, *both, isa)
        assert found.double().eq(float(np.float32(255 * 255 * products.MOST_INNER))).all()
    with pytest.raises(UnsupportedError, match="int32"):
        kernels.matmul(torch.zeros(1, products.MOST_INNER + 1), torch.zeros(products.MOST_INNER + 1, 1), *both)


def test_numbers_that_are_not_finite_reach_what_they_take_part_in() -> None:
    both = grids(GRIDS[0])
    a, b = operands((9, 11, 37), (), both)
    clean = integer_oracle(a, b, *both)
    a[4, 3], b[2, 35], b[10, 0] = torch.nan, torch.inf, -torch.inf
    expected = clean.copy()
    expected[4], expected[:, [0, 35]] = np.nan, np.nan
    for found in (
        reference.integer_matmul(a, b, *both),
        *(products._run(a, y, *both, isa) for isa in native.isas() for y in (b, b.mT.contiguous().mT)),
    ):
        assert np.array_equal(found.numpy(), expected, equal_nan=True)


def test_gradients_are_those_of_the_product_of_what_was_rounded() -> None:
    both = grids(GRIDS[1])
    a, b = (x.requires_grad_() for x in operands((6, 7, 5), (2,), both))
    outer = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    y = kernels.matmul(a, b[0], *both)
    found = torch.autograd.grad(y, (a, b), outer)
    x, w = (reference.round_activations(v.detach(), grid) for v, grid in zip((a, b[0]), both, strict=True))
    torch.testing.assert_close(found[0], outer @ w.mT)
    torch.testing.assert_close(found[1][0], (x.mT @ outer).sum(0))
    assert not found[1][1].any()
    assert torch.equal(y.detach(), kernels.matmul(a.detach(), b[0].detach(), *both))


def test_wrong_operands_are_refused() -> None:
    both = grids(GRIDS[0])
    for a, b in (
        (torch.zeros(2, 3), torch.zeros(4, 2)),
        (torch.zeros(3), torch.zeros(3, 2)),
        (torch.zeros(2, 3), torch.zeros(3, 2).half()),
    ):
        with pytest.raises(InputError, match="rows"):
            kernels.matmul(a, b, *both)
    with pytest.raises(UnsupportedError, match="float64"):
        kernels.matmul(torch.zeros(2, 3).double(), torch.zeros(3, 2).double(), *both)
    with pytest.raises(UnsupportedError, match="calibration"):
        kernels.matmul(torch.zeros(2, 3), torch.zeros(3, 2), *grids(("int8/static/sym", "int8/static/sym")))


@needs_native
def test_the_core_refuses_what_contradicts_itself() -> None:
    x, y = torch.zeros(4, 4), torch.zeros(4, 4)
    operand = (x.data_ptr(), 0, 0, 4, 1, 0.5, 128, 8)
    good = (operand, operand, 1, 1, 4, 4, 4, y.data_ptr(), native.FLAGS["serial"], 1)
    native.core().int8_matmul(*good)
    bad = [(0, (0, *operand[1:])), (1, (*operand[:6], 256, 8)), (1, (*operand[:7], 9)), (0, (*operand[:5], 0.0, 1, 8))]
    bad += [(at, 0) for at in (2, 3, 4, 5, 6, 7, 9)] + [(5, 2**15 + 1)]  # type: ignore[list-item]
    for at, value in bad:
        with pytest.raises(ValueError, match="contradict"):
            native.core().int8_matmul(*good[:at], value, *good[at + 1 :])  # type: ignore[arg-type]
