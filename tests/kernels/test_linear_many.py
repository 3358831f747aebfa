# SPDX-License-Identifier: Apache-2.0
"""Several matrices on one input, and inputs of every dtype: the bits of one float32 call a matrix."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, cast

import pytest
import torch
from kernel_cases import ROWS, activation, raw_matrix

from fewbit import kernels
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError
from fewbit.kernels import native
from fewbit.kernels.tiled import AS_BFLOAT16


def multiplies_bfloat16(matrix: kernels.Prepared) -> bool:
    """Whether many bfloat16 activations are summed in another order than float32 ones."""
    if "avx512bf16" not in native.isas() or matrix.kernel not in ("int24_linear_avx512vnni", "affine_linear_avx512"):
        return False
    format = cast(QTensor, matrix.weight()).format
    whole = format.block % 32 == 0 or format.block >= matrix.shape[1]
    return matrix.kernel.startswith("int24") or (format.bits == 1 and whole)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def matrices(kernel: str, columns: int) -> list[kernels.Prepared]:
    """Three that share activations, one that does not, the reference, and one more."""
    generator = torch.Generator().manual_seed(columns)
    inputs = activation(kernel, "g32")
    made = [raw_matrix(kernel, 4, 32, (rows, columns), generator) for rows in (33, 17, 5)]
    made += [raw_matrix(kernel, bits, 0, (40, columns), generator) for bits in (2, 8)]
    names = [kernel, kernel, kernel, kernel, "reference", kernel]
    return [kernels.prepare(m, n, inputs) for m, n in zip([*made, made[0]], names, strict=True)]


def views(batch: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs (batch, columns) from odd addresses: dense, every other token, every other column, one token repeated,
    columns first."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(2 * batch, 2 * columns + 5, generator=generator).to(dtype)
    return [
        x[:batch, 1 : columns + 1],
        x[1::2, 3 : columns + 3],
        x[:batch, 1 : 2 * columns : 2],
        x[:1, 1 : columns + 1].expand(batch, columns),
        torch.randn(columns, batch + 3, generator=generator).to(dtype)[:, 1 : batch + 1].T,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ROWS)
def test_one_call_gives_the_bits_of_many_in_float32(kernel: str, dtype: torch.dtype) -> None:
    for columns, batch in itertools.product((31, 97), (1, 2, 3, 9, 50)):
        many = matrices(kernel, columns)
        biases = [torch.randn(m.shape[0]).to(dtype) if m.shape[0] != 17 else None for m in many]
        for x in views(batch, columns, dtype):
            ys = kernels.linear_many(x, many, biases)
            for y, matrix, bias in zip(ys, many, biases, strict=True):
                assert y.dtype == dtype and torch.equal(matrix(x, bias), y)
                if matrix.kernel == "reference":
                    continue  # torch adds up in an order that depends on strides
                wide = matrix(x.float().contiguous(), None if bias is None else bias.float())
                if dtype == torch.bfloat16 and batch >= AS_BFLOAT16 and multiplies_bfloat16(matrix):
                    torch.testing.assert_close(y, wide.to(dtype), rtol=2.0**-7, atol=1e-4)
                else:
                    assert torch.equal(y, wide.to(dtype)), (columns, batch, matrix.kernel, x.stride())


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_core_is_called_once_on_what_the_caller_holds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of x or y: the core sees the tensor's own memory, and what it writes is what is returned."""
    calls: list[tuple[Any, ...]] = []
    core = native.core()

    class Spy:
        def linear_many(self, *args: Any) -> None:
            calls.append(args)
            core.linear_many(*args)

    many = matrices(next(name for name in ROWS if name.startswith("affine")), 97)[:3]
    x = torch.randn(4, 2, 101).to(dtype)[:, :, 2:99]
    monkeypatch.setattr(native, "core", Spy)
    ys = kernels.linear_many(x, many, [None] * 3)
    ((outputs, given, *_),) = calls
    assert given == (x.data_ptr(), 8, 101, 1, native.DTYPES[dtype])
    assert [output[2] for output in outputs] == [y.data_ptr() for y in ys]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ROWS)
def test_large_small_and_poisoned_values_round_as_torch_rounds(kernel: str, dtype: torch.dtype) -> None:
    """Results past the largest half, subnormal ones, infinities and NaN."""
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-7, 1.0, 3e3, 1e30):
        matrix = kernels.prepare(
            raw_matrix(kernel, 4, 32, (33, 64), generator, scale=scale), kernel, activation(kernel)
        )
        x = torch.randn(9, 64, generator=generator)
        x[3, 5], x[4, 6], x[5] = torch.inf, torch.nan, 0
        x = x[: AS_BFLOAT16 - 1]  # products of bfloat16 keep infinities, integers do not
        y, expected = matrix(x.to(dtype)), matrix(x.to(dtype).float()).to(dtype)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("kernel", ROWS)
def test_gradients_pass_through_all(kernel: str) -> None:
    many = matrices(kernel, 31)[:3]
    x, bias = torch.randn(2, 31, requires_grad=True), torch.randn(33, requires_grad=True)
    ys = kernels.linear_many(x, many, [bias, None, None])
    sum((y.sum() for y in ys), torch.zeros(())).backward()
    expected = sum((m.qtensor().dequantize().sum(0) for m in many), torch.zeros(31))
    torch.testing.assert_close(x.grad, expected.expand(2, 31), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, torch.full((33,), 2.0))


def test_what_one_call_refuses_many_refuse() -> None:
    kernel = ROWS[0]
    pair = [matrices(kernel, 97)[0], matrices(kernel, 31)[0]]
    with pytest.raises(InputError, match="31"):
        kernels.linear_many(torch.randn(2, 97), pair, [None, None])
    with pytest.raises(InputError, match="bias"):
        kernels.linear_many(torch.randn(2, 97), pair[:1], [torch.randn(5)])
    with pytest.raises(ValueError, match="argument"):
        kernels.linear_many(torch.randn(2, 97), pair[:1], [])
    assert kernels.linear_many(torch.randn(2, 97), [], []) == []
