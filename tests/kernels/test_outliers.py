# SPDX-License-Identifier: Apache-2.0
"""LLM.int8(), token by token: its definition in float64, the paper's own example of a column, and who computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbit import formats, kernels, methods
from fewbit.core.qtensor import QTensor
from fewbit.errors import SpecError
from fewbit.formats.outliers import Outliers
from fewbit.kernels import Window, reference
from fewbit.recipe import Rule

A8 = "int8/channel/outliers6"


def sample(rows: int = 33, columns: int = 97, tokens: int = 5) -> tuple[torch.Tensor, QTensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(tokens, columns, generator=generator)
    x[0, 3], x[tokens // 2, [3, 30]], x[-1, 0] = 60.0, torch.tensor([-6.0, 5.99]), 9.0
    return x, methods.rtn(torch.randn(rows, columns, generator=generator), formats.parse("int8/channel/sym"))


def oracle(x: np.ndarray, matrix: QTensor, threshold: float) -> np.ndarray:
    """Entry by entry: an outlier meets the decoded weight as it is, all others are rounded with the largest of them."""
    weight, y = matrix.dequantize().double().numpy(), []
    for token in x:
        outlier = np.abs(token) >= threshold
        rest = np.where(outlier, 0, token)
        scale = np.float32(np.float16(np.clip(np.float32(2 * np.abs(rest).max()) / np.float32(255), 2.0**-24, 65504)))
        codes = np.clip(np.rint(rest / scale + np.float32(128)), 0, 255) - 128
        y.append(weight @ np.where(outlier, token.astype(float), float(scale) * codes))
    return np.stack(y)


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_it_is_its_definition(kernel: str | None) -> None:
    for shape in ((33, 97, 5), (7, 320, 1), (64, 64, 65)):
        x, matrix = sample(*shape)
        prepared = kernels.prepare(matrix, kernel, formats.parse(A8))
        y = prepared(x)
        magnitude = x.abs().double() @ matrix.dequantize().abs().double().T
        assert np.all(np.abs(y.double().numpy() - oracle(x.numpy(), matrix, 6.0)) <= 400 * 2.0**-24 * magnitude.numpy())


def test_a_token_is_the_same_in_any_company() -> None:
    x, matrix = sample(tokens=4)
    prepared = kernels.prepare(matrix, None, formats.parse(A8))
    together, plain = prepared(x), kernels.prepare(matrix, None, formats.parse("int8/channel/sym"))
    bound = 2.0**-20 * (x.abs() @ matrix.dequantize().abs().T)
    for token in range(4):
        assert bool(((prepared(x[token : token + 1])[0] - together[token]).abs() <= bound[token]).all())
    assert torch.equal(prepared(x[1:2]), plain(x[1:2]))  # without an outlier it is int8, bit for bit


def test_outliers_no_longer_cost_the_others_their_digits() -> None:
    x, matrix = sample()
    exact = x.double() @ matrix.dequantize().double().T
    split, plain = (kernels.prepare(matrix, None, formats.parse(name))(x) for name in (A8, "int8/channel/sym"))
    error = (split[0] - exact[0]).norm(), (plain[0] - exact[0]).norm()
    assert error[0] < error[1] / 8  # a scale of 3 / 127 instead of 60 / 127


def test_the_codes_are_held_once_and_both_rows_are_named() -> None:
    _, matrix = sample()
    prepared = kernels.prepare(matrix, None, formats.parse(A8))
    chosen = kernels.choose(matrix.format, matrix.shape, activation=formats.parse(A8))
    assert chosen.name.startswith("int8_linear")
    assert prepared.kernel == f"{chosen.name} + {kernels.choose(matrix.format, matrix.shape).name}"
    assert prepared.nbytes < 1.3 * kernels.prepare(matrix).nbytes
    assert torch.equal(prepared.qtensor().dequantize(), matrix.dequantize())


def test_gradients_and_convolutions() -> None:
    x, matrix = sample(8, 36)
    x.requires_grad_()
    kernels.prepare(matrix, None, formats.parse(A8))(x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.dequantize().sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    image = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)) * 4
    y = kernels.conv2d(image, kernels.prepare(matrix, None, formats.parse(A8)), Window((3, 3)))
    windows = reference.unfold(image, Window((3, 3)), 0, 32)
    expected = reference.round_activations(windows, formats.parse(A8)) @ matrix.dequantize().T
    torch.testing.assert_close(y.permute(0, 2, 3, 1).reshape(32, 8), expected, rtol=1e-4, atol=1e-3)


def test_spellings() -> None:
    assert formats.parse("INT8/outliers").name == A8
    assert formats.parse("int8/g64/outliers4.5").name == "int8/g64/outliers4.5"
    found = formats.parse(A8)
    assert isinstance(found, Outliers) and formats.parse(found.name) == found
    assert formats.scheme("llm_int8").activation == A8
    for text in ("int8/channel/outliers0", "int8/channel/outliers-1", "int1/channel/outliers6", "int8/asym/outliers6"):
        with pytest.raises(SpecError):
            formats.parse(text)
    with pytest.raises(SpecError, match="format of activations"):
        Rule("*", A8)
