# SPDX-License-Identifier: Apache-2.0
"""What torch was told to use by default, or under autocast, changes no bit: memory that the core writes is of the dtype
that it writes, and products of the reference stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from kernel_cases import ROWS, activation, raw_matrix
from torch import Tensor

from fewbit import formats, kernels, methods
from fewbit.core.terms import Sparse
from fewbit.formats.fixed import Fixed
from fewbit.kernels import reference, table

SETTINGS = ("float64", "bfloat16", "autocast", "device")
X = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
FORMATS = ("int4/g32/asym", "nf4/g32", "palette3", "palette4/row", "vector4x6", "mxfp4", "sign/channel")


@contextmanager
def under(setting: str) -> Iterator[None]:
    """As a user's program may have it around a model that runs."""
    table.family.cache_clear()
    table._chosen.cache_clear()
    with ExitStack() as stack:
        if setting == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif setting == "device":
            stack.enter_context(torch.device("meta"))
        else:
            torch.set_default_dtype(getattr(torch, setting))
            stack.callback(torch.set_default_dtype, torch.float32)
        yield


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kernel", ROWS)
def test_a_row_computes_the_same(kernel: str, setting: str) -> None:
    matrix = raw_matrix(kernel, 4, 32, (40, 64), torch.Generator().manual_seed(2))

    def results() -> list[Tensor]:
        prepared, leaf = kernels.prepare(matrix, kernel, activation(kernel)), X[:5].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(prepared(leaf), leaf, X[:5, :40])
        return [prepared(X), prepared(X[:2].half()), prepared.inputs(X), gradient, torch.cat([*strips(prepared)])]

    expected = results()
    with under(setting):
        assert equal(results(), expected)


def strips(prepared: kernels.PreparedMatrix) -> Iterator[Tensor]:
    return (strip.clone() for _, strip in prepared.decoded())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("spelled", FORMATS)
def test_a_format_is_read_the_same(spelled: str, setting: str) -> None:
    weight = methods.rtn(torch.randn(36, 64, generator=torch.Generator().manual_seed(3)), formats.parse(spelled))
    ids, image = torch.tensor([3, 35, 0]), X[:49].T.reshape(1, 64, 7, 7).repeat(3, 1, 1, 1)
    window = kernels.Window((1, 1), stride=(1, 1), padding=(1, 1))

    def results() -> list[Tensor]:
        prepared = kernels.prepare(weight)
        found = [prepared(X), kernels.embedding(ids, weight), kernels.conv2d(image, prepared, window)]
        return [*found, kernels.conv2d(image[:1, :, :3, :3], prepared, window), weight.dequantize()]

    expected, chosen = results(), kernels.prepare(weight).kernel
    with under(setting):
        assert kernels.prepare(weight).kernel == chosen and equal(results(), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_of_activations_and_sparse_entries_are_the_same(setting: str) -> None:
    grid, few = formats.parse("int8/static/asym/s0.0173/z41"), Sparse.of(X * (X > 1.5))
    assert isinstance(grid, Fixed)

    def results() -> list[Tensor]:
        a = kernels.matmul(X, X.T, grid, grid)
        return [a, reference.integer_matmul(X, X.T, grid, grid), few.dequantize()]

    expected = results()
    with under(setting):
        assert equal(results(), expected)
