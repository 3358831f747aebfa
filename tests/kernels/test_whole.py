# SPDX-License-Identifier: Apache-2.0
"""One scale for a whole matrix, and one for all activations of a call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import HERE, raw_matrix, table_error
from raw_format import exact

import fewbit
from fewbit import formats, kernels, methods
from fewbit.core.qtensor import QTensor
from fewbit.errors import UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.kernels.window import Window

WHOLE = formats.parse("int8/tensor")
ROWS = [row.name for row in HERE if row.family in ("int8", "int8_lut")]


def scale_of(x: torch.Tensor) -> float:
    """From the definition, float16 as stored."""
    return float(np.float16(np.float32(2 * np.abs(x.float().numpy()).max() / np.float32(255))))


def tensor_oracle(x: torch.Tensor, matrix: QTensor, bias: torch.Tensor | None) -> np.ndarray:
    """float64: codes of activations and weights from their definitions, and their products."""
    scale = scale_of(x)
    q = np.clip(np.rint(x.float().numpy() / np.float32(scale) + np.float32(128)), 0, 255).astype(np.float64) - 128
    y = scale * q @ matrix.dequantize().double().numpy().T
    return y if bias is None else y + bias.double().numpy()


@pytest.mark.parametrize("kernel", [*ROWS, "reference"])
def test_a_call_equals_the_float64_oracle_and_the_static_grid_of_its_scale(kernel: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for bits, rows, columns, block in ((4, 33, 97, 0), (3, 7, 512, 64), (6, 17, 31, 0), (2, 97, 320, 32)):
        matrix = raw_matrix(kernel, bits, block, (rows, columns), generator)
        bias = torch.randn(rows, generator=generator) if bits % 2 else None
        for tokens, dtype in ((1, torch.float32), (5, torch.bfloat16), (65, torch.float16)):
            x = torch.randn(tokens, columns, generator=generator) * torch.rand(tokens, 1, generator=generator)
            x = x.to(dtype)
            y = kernels.prepare(matrix, kernel, WHOLE).run(x, bias, torch.float32)
            same = kernels.prepare(matrix, kernel, Fixed(8, True, scale=scale_of(x), zero=128))
            if kernel != "reference":
                assert torch.equal(y, same.run(x, bias, torch.float32))
            rounded = kernels.reference.round_activations(x.float(), WHOLE)
            _, bound = exact(matrix).answer(rounded, bias, table_error(kernel, bits))
            assert bool(((y.double() - torch.from_numpy(tensor_oracle(x, matrix, bias))).abs() <= 2 * bound).all())


@pytest.mark.parametrize("weight", ["int8/tensor/sym", "int8/tensor/asym", "int4/tensor/asym", "int2/tensor/sym"])
def test_one_scale_is_stored_and_every_row_of_the_table_runs_it(weight: str) -> None:
    generator = torch.Generator().manual_seed(1)
    format = formats.parse(weight)
    for rows, columns, tokens in ((1, 1, 1), (7, 97, 5), (33, 256, 65)):
        matrix = methods.rtn(torch.randn(rows, columns, generator=generator) * 3, format)
        x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
        codes, params = matrix.logical()
        zero = params.get("zero_point", torch.full((1, 1, 1), format.levels / 2)).double().reshape(-1)[0]
        values = float(params["scale"].reshape(-1)[0]) * (codes.double() - zero)
        assert len(params["scale"].unique()) == 1
        for row in HERE:
            rounding = WHOLE if row.integers else None
            if row.family == "xnor" or row.refuse(format, matrix.shape, rounding) is not None:
                continue
            y = kernels.prepare(matrix, row.name, rounding)(x, bias)
            z = kernels.reference.round_activations(x, rounding).double()
            bound = (
                (columns + 64)
                * 2.0**-22
                * (z.abs() @ (values.abs() + 256 * 0.0 + float(params["scale"].max()) * 256).T)
            )
            assert bool(((y.double() - (z @ values.T + bias)).abs() <= bound + 1e-6).all()), row.name


def test_a_token_depends_on_its_company_and_on_nothing_else() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = methods.rtn(torch.randn(20, 64, generator=generator), formats.parse("int8/channel"))
    x = torch.randn(4, 64, generator=generator) * torch.tensor([[1.0], [1.0], [1.0], [50.0]])
    prepared = kernels.prepare(matrix, None, WHOLE)
    assert not torch.equal(prepared(x)[:3], prepared(x[:3]))
    assert torch.equal(prepared(x)[[2, 0, 3, 1]], prepared(x[[2, 0, 3, 1]]))
    assert torch.equal(prepared(x[:1]), kernels.prepare(matrix, None, formats.parse("int8/channel"))(x[:1]))
    together = kernels.linear_many(x, [prepared, prepared], [None, None])
    assert all(torch.equal(y, prepared(x)) for y in together)
    assert prepared(x[:0]).shape == (0, 20)


@pytest.mark.parametrize("kernel", [*ROWS, "reference", "affine_linear_serial"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_number_that_is_none_leaves_no_scale_to_any_token(kernel: str, bad: float) -> None:
    matrix = raw_matrix(kernel, 4, 0, (5, 40), torch.Generator().manual_seed(4))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    x[1, 7] = bad
    assert bool(kernels.prepare(matrix, kernel, WHOLE)(x).isnan().all())


def test_rows_that_round_token_by_token_and_convolutions_refuse_it() -> None:
    for name in ("int8_vector_linear_serial", "int8_row_lut_linear_serial"):
        row = kernels.table.named(name)
        format = formats.parse("vector4x8" if "vector" in name else "palette4/row")
        for grid in (WHOLE, formats.parse("int8/static/sym/s0.5")):
            reason = row.refuse(format, (32, 64), grid)
            assert reason is not None and f"token by a scale of its own; activations are {grid.name}" in reason
    prepared = kernels.prepare(methods.rtn(torch.randn(4, 27), formats.parse("int8/channel")), None, WHOLE)
    window = Window((3, 3), (1, 1), (0, 0), (1, 1), 1)
    with pytest.raises(UnsupportedError, match=r"windows are rounded as they are met.*int8/static"):
        kernels.conv2d(torch.randn(1, 3, 8, 8), prepared, window)


def test_convolutions_of_a_network_are_refused_before_any_work() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3))
    with pytest.raises(UnsupportedError, match=r"int8/tensor/sym for 0; .*window by window; int8/static"):
        fewbit.network.quantize(network, "W8A8_TENSOR", inputs=[torch.randn(1, 3, 8, 8)])
