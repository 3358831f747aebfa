# SPDX-License-Identifier: Apache-2.0
"""Convolution by sums of terms, against its definition in float64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from kernel_cases import FLOAT_ROWS
from test_conv import CASES, windows
from test_terms import BESIDE, EPS, ROUNDING, every_kind, times
from torch import Tensor

from fewbit import formats, kernels
from fewbit.core.terms import Dense, Terms
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import Window

Case = tuple[Window, int, tuple[int, int, int, int]]
WHOLE = [case for case in CASES if case[0].groups == 1]
GROUPED = [case for case in CASES if case[0].groups > 1 and case[2][1] < 100]


def sums(kernel: str, case: Case) -> tuple[list[Terms], Tensor, Tensor]:
    """(a sum of each kind of term, x, bias)."""
    window, rows, shape = case
    generator = torch.Generator().manual_seed(rows)
    columns = shape[1] // window.groups * window.size[0] * window.size[1]
    found = every_kind(kernel, (rows, columns), generator)
    return found, torch.randn(shape, generator=generator), torch.randn(rows, generator=generator)


def check(rows: Iterable[str], terms: Terms, x: Tensor, window: Window, bias: Tensor) -> None:
    ys = [kernels.conv2d(x, kernels.prepare(terms, row), window, bias) for row in rows]
    high, wide = window.out(x)
    assert all(y.dtype == x.dtype and y.shape == (x.shape[0], terms.shape[0], high, wide) for y in ys)
    tokens = windows(x, window).reshape(-1, window.groups, terms.shape[1])
    high = terms.shape[0] // window.groups
    for group in range(window.groups):
        flat, own = tokens[:, group], slice(group * high, (group + 1) * high)
        answer, bound = times(terms, (flat, torch.zeros_like(flat)))
        # Torch adds up whole windows where it convolves, of weights that were summed in float32.
        largest = answer.abs() + bound + flat.abs() @ terms.dequantize().double().abs().T
        bound = (bound + (terms.shape[1] + 16) * EPS * largest)[:, own]
        answer = answer[:, own] + bias[own].double()
        bound = bound + ROUNDING[x.dtype] * 2 * (answer.abs() + bound)
        for row, y in zip(rows, ys, strict=True):
            found = y[:, own].permute(0, 2, 3, 1).reshape(-1, high).double()
            assert bool(((found - answer).abs() <= bound).all()), (row, window, terms)


@pytest.mark.parametrize("case", WHOLE + GROUPED, ids=str)
def test_every_kind_of_term_on_every_window(case: Case) -> None:
    found, x, bias = sums("reference", case)
    for number, terms in enumerate(found):
        check(BESIDE.values(), terms, x, case[0], bias)
        dtype = list(ROUNDING)[number % 3]
        check(BESIDE.values(), terms, x.to(dtype).to(memory_format=torch.channels_last), case[0], bias)


def test_windows_are_the_tokens_that_inputs_are_rounded_by() -> None:
    """Rounded inputs: the same bits as the windows, copied out, through the sum."""
    inputs = formats.parse("int8/channel/sym")
    for case in WHOLE:
        window, (found, x, bias) = case[0], sums(FLOAT_ROWS[0], case)
        for terms in found:
            prepared = kernels.prepare(terms, activation=inputs)
            tokens = windows(x, window).float().reshape(-1, terms.shape[1])
            expected = prepared(tokens, bias).reshape(x.shape[0], *window.out(x), -1).permute(0, 3, 1, 2)
            torch.testing.assert_close(kernels.conv2d(x, prepared, window, bias), expected, rtol=1e-4, atol=1e-4)
            assert kernels.route(prepared, window, 10**6) == "strips"


def test_gradients_are_those_of_the_sum() -> None:
    for case in (WHOLE[2], GROUPED[0]):
        window, (found, x, bias) = case[0], sums("reference", case)
        for terms in found:
            here, twin = x.clone().requires_grad_(), x.double().requires_grad_()
            y = kernels.conv2d(here, kernels.prepare(terms), window, bias)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            y.backward(upstream)
            weight = terms.dequantize().double().reshape(terms.shape[0], -1, *window.size)
            arguments = (window.stride, window.padding, window.dilation, window.groups)
            torch.nn.functional.conv2d(twin, weight, None, *arguments).backward(upstream.double())
            assert here.grad is not None and twin.grad is not None
            size = float(twin.grad.abs().max())
            assert float((here.grad - twin.grad).abs().max()) <= 1e-5 * size


def test_what_a_sum_cannot_is_refused() -> None:
    found, x, bias = sums("reference", GROUPED[0])
    prepared = kernels.prepare(found[0], activation=formats.parse("int8/channel/sym"))
    with pytest.raises(UnsupportedError, match="float inputs, one group"):
        kernels.conv2d(x, prepared, GROUPED[0][0], bias)
    with pytest.raises(InputError, match="would work"):
        kernels.conv2d(x, kernels.prepare(found[0]), Window((5, 5)), bias)


def test_a_prepared_sum_gives_back_what_it_was_made_from() -> None:
    for terms in sums("affine", WHOLE[3])[0]:
        back = kernels.prepare(terms).weight()
        assert torch.equal(back.dequantize(), terms.dequantize())
        assert [type(term) for term in back.terms] == [type(term) for term in terms.terms]
        for scale, stored in ((back.row_scale, terms.row_scale), (back.column_scale, terms.column_scale)):
            assert (scale is None) == (stored is None) and (scale is None or torch.equal(scale, stored))
    dense = sums("affine", WHOLE[3])[0][1].terms[1]
    assert isinstance(dense, Dense) and kernels.prepare(dense.qtensor).weight().shape == dense.shape
