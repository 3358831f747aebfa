# SPDX-License-Identifier: Apache-2.0
"""Signs times signs: the same numbers as the definition gives in float64, within three roundings, on every instruction
set; and a reason wherever signs cannot be counted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BATCHES, SIZES, XNOR_ROWS, signs

from fewbit import formats, kernels
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor
from fewbit.kernels import native
from fewbit.kernels.table import MOST_SIGNS

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
SIGN = formats.parse("sign/channel")
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def exact(x: torch.Tensor, matrix: QTensor) -> torch.Tensor:
    """``x W^T`` in float64 by the definition: both scales times the sum of products of signs."""
    scale = x.double().abs().mean(1).float().clamp(2.0**-24, 65504).half()
    plus = torch.where(x.float() / scale.float()[:, None] > 0, 1.0, -1.0).double()
    codes, params = matrix.logical()
    sums = plus @ (2 * codes.double() - 1).T
    return sums * scale.double()[:, None] * params["scale"].double().reshape(1, -1)


def check(kernel: str, matrix: QTensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    y = kernels.prepare(matrix, kernel, SIGN)(x, bias)
    product = exact(x.reshape(-1, x.shape[-1]), matrix).reshape(y.shape)
    added = torch.zeros(()) if bias is None else bias.double()
    bound = 3 * 2.0**-24 * (product.abs() + added.abs())
    bound += ROUNDING[x.dtype] * ((product + added).abs() + bound)
    assert y.dtype == x.dtype
    assert bool(((y.double() - product - added).abs() <= bound).all()), (matrix.shape, x.shape)
    rounded = kernels.reference.round_activations(x.float(), SIGN)
    torch.testing.assert_close(kernels.reference.oracle(rounded, matrix), product, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kernel", XNOR_ROWS)
def test_sizes_and_batches(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in SIZES:
        for columns in (*SIZES, 992, 993, 1100):  # a byte counts 31 chunks of 32 columns
            batch = BATCHES[(rows + columns) % len(BATCHES)]
            x = torch.randn(batch, columns, generator=generator)
            check(
                kernel,
                signs((rows, columns), generator),
                x,
                torch.randn(rows, generator=generator) if rows % 3 else None,
            )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kernel", XNOR_ROWS)
def test_dtypes_strides_and_unaligned_rows(kernel: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = signs((33, 97), generator)
    for batch in BATCHES:
        whole = torch.randn(2 * batch, 101, generator=generator).to(dtype)
        bias = torch.randn(33, generator=generator).to(dtype)
        check(kernel, matrix, whole[::2, 1:98], bias)
        check(kernel, matrix, whole[:1, 3:100].expand(batch, 97), bias)
        check(kernel, matrix, whole.T[:97, :batch].T, None)
        check(kernel, matrix, whole[:, 1:98].reshape(2, batch, 97), bias)


@pytest.mark.parametrize("kernel", XNOR_ROWS)
def test_zeros_denormals_and_extremes(kernel: str) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = signs((17, 70), generator)
    matrix.params["scale"][:4] = torch.tensor([0.0, 2.0**-24, 65504.0, 0.0]).reshape(4, 1, 1)
    normal = torch.randn(6, 70, generator=generator)
    tiny = torch.arange(70).float()[None] * 2.0**-149
    tiny[0, 0] = 2.0**12  # the rest, divided by a scale of 58, rounds to zero below 30 * 2^-149
    for x in (torch.zeros(3, 70), -torch.zeros(1, 70), normal * 1e-42, normal * 1e30, tiny, -tiny, normal.abs()):
        check(kernel, matrix, x, None)
    infinite = normal.clone()
    infinite[1, 3], infinite[2, 4] = torch.inf, -torch.inf
    check(kernel, matrix, infinite, None)
    normal[4, 69] = torch.nan
    y = kernels.prepare(matrix, kernel, SIGN)(normal)
    assert bool(y[4].isnan().all()) and not bool(y[[0, 1, 2, 3, 5]].isnan().any())


def test_the_bits_are_the_same_everywhere() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix, x = signs((530, 2300), generator), torch.randn(70, 2300, generator=generator)
    expected = kernels.prepare(matrix, "xnor_linear_serial", SIGN)(x)
    for name in XNOR_ROWS:
        prepared = kernels.prepare(matrix, name, SIGN)
        for tokens in (1, 2, 3, 9, 70):
            assert torch.equal(prepared(x[:tokens]), expected[:tokens])
    assert torch.equal(torch.cat([prepared(token) for token in x.split(1)]), expected)


@pytest.mark.parametrize(
    ("weight", "inputs", "reason"),
    [
        ("sign/channel", None, "stay float"),
        ("sign/channel", "int8/channel/sym", "activations are int8/channel/sym"),
        ("sign/channel", "sign/g64", "activations are sign/g64"),
        ("sign/g128", "sign/channel", "weights are sign/g128"),
        ("ternary/channel", "sign/channel", "weights are ternary/channel"),
    ],
)
def test_others_are_refused_and_still_served(weight: str, inputs: str | None, reason: str) -> None:
    activation = None if inputs is None else formats.parse(inputs)
    choice = kernels.choose(formats.parse(weight), (64, 256), activation=activation)
    assert reason in choice.reasons["xnor_linear_serial"] and choice.kernel.family != "xnor"


def test_signs_are_chosen_for_signs_as_far_as_they_add_up_exactly() -> None:
    for weight, inputs in [("sign/channel", "sign/channel"), ("sign/g256", "sign/g300")]:
        choice = kernels.choose(formats.parse(weight), (64, 256), activation=formats.parse(inputs))
        assert choice.name == XNOR_ROWS[0]
    assert kernels.choose(SIGN, (1, MOST_SIGNS), activation=SIGN).name == XNOR_ROWS[0]
    choice = kernels.choose(SIGN, (1, MOST_SIGNS + 1), activation=SIGN)
    assert choice.kernel.family in ("affine", "int24") and str(MOST_SIGNS) in choice.reasons["xnor_linear_serial"]


def test_a_fitted_weight_gives_what_the_reference_gives() -> None:
    weight, x = torch.randn(37, 300), torch.randn(5, 300)
    params = F.fit(SIGN, weight)
    matrix = QTensor.of(SIGN, F.encode(SIGN, weight, params), params)
    expected = kernels.reference.linear(kernels.reference.round_activations(x, SIGN), matrix)
    torch.testing.assert_close(kernels.linear(x, matrix, activation=SIGN), expected, rtol=1e-4, atol=1e-4)
