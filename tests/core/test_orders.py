# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices against their definition, and a width's product against its dense matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit.core.orders import order_of, paley
from fewbit.core.rewrite import Hadamard, hadamard
from fewbit.errors import InputError

ORDERS = (12, 20, 28, 36, 44, 52, 60, 76, 100, 108, 140, 148, 312, 344)
"""Over fields of a prime and of powers of one (27, 25, 49, 343), from both of Paley's families."""


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_and_the_first_is_ones(order: int) -> None:
    matrix = paley(order).numpy()
    assert order_of(order) == order and set(np.unique(matrix)) == {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order)) and (matrix[0] == 1).all()


def test_widths_of_models_have_an_order() -> None:
    widths = {
        288: 36,
        576: 36,
        768: 12,
        896: 28,
        1536: 12,
        4096: 1,
        5120: 20,
        11008: 344,
        13824: 108,
        14336: 28,
        40: 20,
    }
    assert {width: order_of(width) for width in widths} == widths
    assert [order_of(width) for width in (156, 172, 2 * 156, 4 * 172, 6, 33)] == [None, None, 312, 344, None, None]


@pytest.mark.parametrize("columns", [12, 24, 288, 896])
def test_the_product_is_that_of_the_dense_matrix(columns: int) -> None:
    step = Hadamard.random(columns, seed=2)
    sylvester = np.ones((1, 1))
    while len(sylvester) < step.block:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    dense = np.kron(paley(step.order).numpy(), sylvester)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bound = columns * np.finfo(float).eps * np.abs(x.numpy()).sum(-1, keepdims=True)
    assert (np.abs(hadamard(x, step.block, step.order).numpy() - x.numpy() @ dense) <= bound).all()
    transposed = hadamard(x, step.block, step.order, transposed=True).numpy()
    assert (np.abs(transposed - x.numpy() @ dense.T) <= bound).all()
    assert (step.inverse(step.apply(x)) - x).abs().max() <= 4 * bound.max()
    single = step.apply(x.float()).double()
    assert (single - step.apply(x)).abs().max() <= columns**0.5 * 2.0**-22 * float(x.abs().sum(-1).max())


def test_widths_without_a_matrix_are_refused() -> None:
    with pytest.raises(InputError, match="none is known here"):
        Hadamard.random(172, seed=0)
