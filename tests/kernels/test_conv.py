# SPDX-License-Identifier: Apache-2.0
"""Convolution against its definition in float64, for every row of the table and every way of computing it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from kernel_cases import FAMILIES, FLOAT_ROWS, ROWS, activation, raw_matrix, table_error
from raw_format import exact
from torch import Tensor

from fewbit import formats, kernels
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.kernels import Window, conv, decoded, native

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Shape = tuple[int, int, int, int]
# (window, rows, x): odd sizes, every argument, windows larger than the image, few and many positions, groups.
CASES: list[tuple[Window, int, Shape]] = [
    (Window((1, 1)), 7, (2, 31, 5, 3)),
    (Window((1, 1)), 33, (1, 33, 9, 7)),
    (Window((3, 3), padding=(1, 1)), 33, (2, 5, 13, 11)),
    (Window((1, 1)), 3, (3, 9, 10, 9)),
    (Window((1, 1), stride=(2, 3)), 17, (3, 7, 8, 11)),
    (Window((1, 1), padding=(1, 0)), 5, (1, 3, 4, 4)),
    (Window((3, 3), padding=(1, 1)), 31, (1, 7, 9, 8)),
    (Window((3, 3), padding=(1, 1)), 16, (1, 4, 4, 4)),
    (Window((3, 3), (2, 2), (1, 1)), 33, (2, 11, 13, 15)),
    (Window((1, 7), (1, 3), (0, 3), (1, 2)), 3, (1, 5, 2, 17)),
    (Window((5, 2), (3, 1), (4, 1), (2, 3)), 18, (2, 3, 7, 9)),
    (Window((3, 3), padding=(3, 4), dilation=(3, 4)), 2, (1, 1, 1, 2)),
    (Window((7, 7), (2, 2), (3, 3)), 8, (1, 3, 15, 17)),
    (Window((3, 3), padding=(1, 1), groups=2), 6, (1, 10, 5, 7)),
    (Window((3, 2), (2, 1), (0, 1), (1, 2), groups=3), 48, (2, 9, 8, 9)),
    (Window((3, 3), padding=(1, 1), groups=13), 13, (1, 13, 6, 5)),
    (Window((5, 5), (2, 2), (2, 2), groups=5), 10, (2, 5, 4, 3)),
    (Window((3, 3), padding=(1, 1), groups=2), 32, (2, 6, 5, 7)),
    (Window((2, 3), (3, 2), (1, 4), (2, 3), groups=2), 14, (2, 4, 13, 12)),
    (Window((1, 2), (4, 5), (0, 1), groups=3), 3, (1, 3, 9, 17)),
    (Window((3, 3), padding=(1, 1), groups=2), 34, (1, 128, 17, 31)),
]


def windows(x: Tensor, window: Window) -> Tensor:
    """(images, height, width, channels, down, across) in float64: ``x[n, c, stride h + dilation i - padding, ...]``,
    zero outside of the image; element by element, and so once for the same values."""
    return _windows(window, tuple(x.shape), x.double().numpy().tobytes())


@lru_cache(maxsize=64)
def _windows(window: Window, shape: Shape, values: bytes) -> Tensor:
    x = torch.frombuffer(bytearray(values), dtype=torch.float64).reshape(shape)
    images, channels, height, width = shape
    high, wide = window.out(x)
    found = torch.zeros(images, high, wide, channels, *window.size, dtype=torch.float64)
    for h, w, i, j in itertools.product(range(high), range(wide), *(range(n) for n in window.size)):
        row = window.stride[0] * h + window.dilation[0] * i - window.padding[0]
        column = window.stride[1] * w + window.dilation[1] * j - window.padding[1]
        if 0 <= row < height and 0 <= column < width:
            found[:, h, w, :, i, j] = x[:, :, row, column]
    return found


def definition(
    x: Tensor,
    matrix: QTensor,
    window: Window,
    bias: Tensor | None,
    inputs: Format | None,
    table_error: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, bound), float64 (images, out, height, width): the sum over a window, rounded to ``inputs`` as one token."""
    rows, columns = matrix.shape
    tokens = windows(x, window).reshape(*(x.shape[0], *window.out(x)), window.groups, columns)
    tokens = kernels.reference.round_activations(tokens.float(), inputs)
    answer, bound = [], []
    weight = exact(matrix)
    for group in range(window.groups):
        part = slice(group * rows // window.groups, (group + 1) * rows // window.groups)
        # Torch, which computes some of the ways, adds up whole windows.
        operations = max(weight.operations, columns + 12)
        own = replace(
            weight,
            weight=weight.weight[part],
            magnitude=weight.magnitude[part],
            largest=weight.largest[part],
            operations=operations,
        )
        found = own.answer(tokens[..., group, :], None if bias is None else bias[part], table_error)
        answer.append(found[0])
        bound.append(found[1])
    return torch.cat(answer, -1).permute(0, 3, 1, 2), torch.cat(bound, -1).permute(0, 3, 1, 2)


def check(
    kernel: str, x: Tensor, matrix: QTensor, window: Window, bias: Tensor | None, inputs: Format | None = None
) -> Tensor:
    return check_all([kernel], x, matrix, window, bias, inputs)[0]


def check_all(
    rows: list[str], x: Tensor, matrix: QTensor, window: Window, bias: Tensor | None, inputs: Format | None
) -> list[Tensor]:
    """What each of ``rows``, of one family, gives; seen to be within its bound of the definition."""
    answer, bound = definition(x, matrix, window, bias, inputs, table_error(rows[0], matrix.format.bits))
    bound = bound + ROUNDING[x.dtype] * (answer.abs() + bound)
    ys = [kernels.conv2d(x, kernels.prepare(matrix, row, inputs), window, bias) for row in rows]
    for row, y in zip(rows, ys, strict=True):
        assert y.dtype == x.dtype and y.shape == answer.shape
        error = (y.double() - answer).abs()
        assert bool((error <= bound).all()), (row, window, x.shape, float((error - bound).max()))
    return ys


def case(window: Window, rows: int, shape: Shape, kernel: str, bits: int = 4) -> tuple[QTensor, Tensor, Tensor]:
    """(matrix, x, bias): random, scales for each block of 32 columns or for whole rows; all kernels have the same x."""
    generator, own = (torch.Generator().manual_seed(rows + more) for more in (0, 1000))
    columns = shape[1] // window.groups * window.size[0] * window.size[1]
    matrix = raw_matrix(kernel, bits, 32 * (rows % 2), (rows, columns), generator)
    return matrix, torch.randn(shape, generator=own), torch.randn(rows, generator=own)


def test_the_oracle_is_torchs_convolution() -> None:
    for window, rows, shape in CASES:
        matrix, x, bias = case(window, rows, shape, "reference")
        weight = exact(matrix).weight.reshape(rows, -1, *window.size)
        arguments = (window.stride, window.padding, window.dilation, window.groups)
        expected = torch.nn.functional.conv2d(x.double(), weight, bias.double(), *arguments)
        torch.testing.assert_close(definition(x, matrix, window, bias, None)[0], expected)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_every_row_on_every_window(case_: tuple[Window, int, Shape]) -> None:
    for family, rows in FAMILIES.items():
        matrix, x, bias = case(*case_, family)
        check_all(rows, x, matrix, case_[0], bias, activation(family))
        last = x.to(memory_format=torch.channels_last)
        for y in check_all(rows, last, matrix, case_[0], None, activation(family, "g32")):
            assert y.is_contiguous(memory_format=torch.channels_last) or last.is_contiguous()  # of one channel: both


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_and_strides(family: str, dtype: torch.dtype) -> None:
    names, inputs = FAMILIES[family], activation(family)
    for window, rows, shape in (CASES[1], CASES[7], CASES[8], CASES[14], CASES[15]):
        matrix, x, bias = case(window, rows, shape, family, 3)
        x = x.to(dtype)
        assert all(y.is_contiguous() for y in check_all(names, x, matrix, window, bias.to(dtype), inputs))
        wide = torch.zeros(shape[0], shape[1] + 1, shape[2] + 3, 2 * shape[3] + 1, dtype=dtype)
        wide[:, 1:, 2:-1, 1::2] = x
        check_all(names, wide[:, 1:, 2:-1, 1::2], matrix, window, None, inputs)
        check_all(names, x[:1, :, :1, :1].expand(2, -1, *shape[2:]), matrix, window, bias.to(dtype), inputs)


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_float_rows_round_their_windows_as_well(kernel: str) -> None:
    for window, rows, shape in (CASES[6], CASES[14]):
        matrix, x, bias = case(window, rows, shape, kernel)
        check(kernel, x, matrix, window, bias, formats.parse("int4/g16/asym"))


def test_the_ways_are_those_documented() -> None:
    plain = kernels.prepare(raw_matrix("affine", 4, 0, (6, 27), torch.Generator().manual_seed(0)), "reference")
    rounding = kernels.prepare(plain.qtensor(), "reference", formats.parse("int8/channel/sym"))
    dense, grouped = Window((3, 3)), Window((3, 3), groups=3)
    assert [kernels.route(plain, dense, n) for n in (1, conv.DIRECT - 1, conv.DIRECT)] == ["strips", "strips", "direct"]
    assert kernels.route(rounding, dense, 10**6) == "strips"
    assert kernels.route(plain, grouped, 1) == "direct"
    assert kernels.route(rounding, grouped, 1) == "rounded"


@pytest.mark.parametrize("kernel", ROWS)
def test_strips_are_bounded_and_cut_anywhere(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unfold, held = conv.unfold, [0]

    def watched(x: Tensor, window: Window, begin: int, end: int, out: Tensor) -> None:
        held.append(out.numel())
        unfold(x, window, begin, end, out)

    monkeypatch.setattr(conv, "unfold", watched)
    monkeypatch.setattr(conv, "DIRECT", 10**9)
    inputs = activation(kernel)
    for window, rows, shape in (CASES[0], CASES[7], CASES[8], CASES[14]):
        matrix, x, bias = case(window, rows, shape, kernel)
        whole = check(kernel, x, matrix, window, bias, inputs)
        width = shape[1] * window.size[0] * window.size[1]
        for limit in (1, 5 * width + 1):  # a window at a time, and five, which no row of an output is long
            held.clear()
            monkeypatch.setattr(conv, "UNFOLDED", limit)
            y = check(kernel, x, matrix, window, bias, inputs)
            way = kernels.route(kernels.prepare(matrix, kernel, inputs), window, 1)
            assert max(held, default=0) <= max(limit, width) and bool(held) == (way in ("strips", "rounded"))
            if inputs is not None and window.groups == 1:
                assert torch.equal(y, whole)
        monkeypatch.setattr(conv, "UNFOLDED", 1 << 18)


@pytest.mark.parametrize("kernel", FLOAT_ROWS)
def test_weights_are_decoded_a_strip_at_a_time(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "STRIP", 1)
    monkeypatch.setattr(kernels.reference, "CHUNK", 1)
    for window, rows, shape in (CASES[2], CASES[14]):
        matrix, x, bias = case(window, rows, shape, kernel)
        prepared = kernels.prepare(matrix, kernel)
        least = 1 if kernel.startswith("vector") else 3  # a tile of vectors has more rows than these matrices
        assert len([rows for rows, _ in prepared.decoded()]) >= least
        for rows, weight in prepared.decoded():
            torch.testing.assert_close(weight, matrix.dequantize()[rows])
        check(kernel, x, matrix, window, bias)
        y = check(kernel, x.to(memory_format=torch.channels_last), matrix, window, bias)
        assert y.is_contiguous(memory_format=torch.channels_last)


@needs_native
@pytest.mark.parametrize("dtype", ROUNDING)
def test_native_windows_are_the_reference(dtype: torch.dtype) -> None:
    for window, _, shape in CASES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[:, :, 0, 0] = torch.nan
        expected = windows(x, window).reshape(-1, shape[1] * window.size[0] * window.size[1])
        for memory in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            for begin, end in ((0, len(expected)), (1, len(expected)), (len(expected) // 2, len(expected) // 2 + 1)):
                out = torch.full((end - begin + 2, expected.shape[1]), 7.0, dtype=dtype)
                conv.unfold(memory, window, begin, end, out[1:-1])
                assert torch.equal(out[1:-1].double().nan_to_num(5), expected[begin:end].nan_to_num(5))
                slow = kernels.reference.unfold(memory, window, begin, end)
                bits = torch.int32 if dtype == torch.float32 else torch.int16
                assert torch.equal(out[1:-1].view(bits), slow.view(bits))
                assert bool((out[[0, -1]] == 7).all())
                if dtype == torch.float32:  # four bytes off the alignment of a vector
                    odd = torch.empty(out.numel() + 1)[1:].reshape(out.shape)[1:-1]
                    conv.unfold(memory, window, begin, end, odd)
                    assert torch.equal(odd.view(torch.int32), out[1:-1].view(torch.int32))


@needs_native
def test_the_core_refuses_windows_that_cannot_be() -> None:
    x, out = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1)
    good = (1, 3, 3, 9, 9, 3, 1, 1, 1, 1, 1, 0, 0, 1, 1, 3, 3, 4)
    native.core().unfold(good, x.data_ptr(), 0, 1, out.data_ptr(), 1)
    for at, value in [(0, 0), (1, 0), (2, -1), (7, 0), (8, 0), (9, 0), (10, 0), (11, -1), (12, -1), (13, 0), (14, 0)]:
        bad = (*good[:at], value, *good[at + 1 :])
        with pytest.raises(ValueError, match="contradict"):
            native.core().unfold(bad, x.data_ptr(), 0, 1, out.data_ptr(), 1)
    for bad in ((*good[:15], 0, 3, 4), (*good[:16], 0, 4), (*good[:17], 8)):
        with pytest.raises(ValueError, match="contradict"):
            native.core().unfold(bad, x.data_ptr(), 0, 1, out.data_ptr(), 1)
    for begin, end, threads in ((-1, 0, 1), (1, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match="contradict"):
            native.core().unfold(good, x.data_ptr(), begin, end, out.data_ptr(), threads)


def test_without_the_native_module_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    window, rows, shape = CASES[10]
    matrix, x, bias = case(window, rows, shape, "affine")
    prepared = kernels.prepare(matrix, "reference", formats.parse("int8/channel/sym"))
    expected = kernels.conv2d(x, prepared, window, bias)
    monkeypatch.setattr(native, "_load", lambda: (None, "there is no compiler on the moon"))
    assert torch.equal(kernels.conv2d(x, prepared, window, bias), expected)


@needs_native
def test_kernels_of_integers_agree_bit_for_bit_at_any_thread_count() -> None:
    window, rows, shape = CASES[8]
    found = []
    for kernel in (name for name in ROWS if name.startswith("int8_linear")):
        matrix, x, bias = case(window, rows, shape, kernel)
        prepared = kernels.prepare(matrix, kernel, activation(kernel))
        for threads in (1, 2, 3):
            kernels.set_threads(threads)
            found.append(kernels.conv2d(x, prepared, window, bias))
        kernels.set_threads(None)
    assert len(found) >= 6 and all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("inputs", [None, "int8/channel/sym"])
@pytest.mark.parametrize("number", [1, 2, 6, 7, 8, 14, 15])
def test_gradients_are_those_of_the_dequantized_weight(number: int, inputs: str | None) -> None:
    window, rows, shape = CASES[number]
    matrix, x, bias = case(window, rows, shape, "reference")
    prepared = kernels.prepare(matrix, "reference", formats.parse(inputs) if inputs else None)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y = kernels.conv2d(x, prepared, window, bias)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(upstream)
    weight = matrix.dequantize().reshape(rows, -1, *window.size)
    twin = x.detach().requires_grad_()
    arguments = (window.stride, window.padding, window.dilation, window.groups)
    torch.nn.functional.conv2d(twin, weight, None, *arguments).backward(upstream)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 2, 3)))


@pytest.mark.parametrize("kernel", ROWS)
def test_no_image_negated_memory_and_a_bad_pixel_that_spoils_its_windows_only(kernel: str) -> None:
    for number in (1, 2, 6, 7, 14, 15):
        window, rows, shape = CASES[number]
        matrix, x, bias = case(window, rows, shape, kernel)
        prepared = kernels.prepare(matrix, kernel, activation(kernel))
        assert kernels.conv2d(x[:0], prepared, window, bias).shape == (0, rows, *window.out(x))
        negated = torch._neg_view(-x)  # memory holds -x
        assert torch.equal(kernels.conv2d(negated, prepared, window, bias), kernels.conv2d(x, prepared, window, bias))
        for bad in (torch.nan, torch.inf):
            if bad == torch.inf and kernels.route(prepared, window, 1) == "rounded":
                continue  # formats round infinity to their largest value
            x[0, :, 0, 0] = bad
            seen = windows(x, window).isfinite().all(-1).all(-1).all(-1)
            y = kernels.conv2d(x, prepared, window, bias)
            assert torch.equal(y.isfinite().all(1), seen) and bool(y[:, :, ~seen[0]][:1].isfinite().logical_not().all())


def test_wrong_inputs_are_refused() -> None:
    prepared = kernels.prepare(raw_matrix("affine", 4, 0, (6, 27), torch.Generator().manual_seed(0)), "reference")
    window = Window((3, 3))
    x = torch.randn(1, 3, 5, 5)
    for found, works in ((x[0], "images, 3,"), (x[:, :2], "images, 3,"), (x[:, :, :2], "larger images")):
        with pytest.raises(InputError, match=works):
            kernels.conv2d(found, prepared, window)
    with pytest.raises(InputError, match=r"\(6,\)"):
        kernels.conv2d(x, prepared, window, torch.randn(5))
    with pytest.raises(InputError, match="multiple of 25"):
        kernels.conv2d(x, prepared, Window((5, 5)))
    with pytest.raises(InputError, match="rows of 4"):
        kernels.conv2d(x, prepared, Window((3, 3), groups=4))
    with pytest.raises(UnsupportedError, match="float64"):
        kernels.conv2d(x.double(), prepared, window)
    for wrong in ({"size": (0, 1)}, {"stride": (1, 0)}, {"padding": (-1, 0)}, {"dilation": (0, 1)}, {"groups": 0}):
        with pytest.raises(SpecError, match="would work"):
            Window(**{"size": (3, 3), **wrong})  # type: ignore[arg-type]
