# SPDX-License-Identifier: Apache-2.0
"""Prepared matrices: the same bits at any thread count and batch, nothing lost, and safe to copy, fork and share."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kernel_cases import ROWS, XNOR_ROWS, activation, raw_matrix
from torch.autograd import forward_ad

from fewbit import formats, kernels, layouts, methods
from fewbit.core import format as F
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import native, table

NATIVE = [*XNOR_ROWS, *(name for name in ROWS if name != "reference")]
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    kernels.set_threads(None)


def prepared(kernel: str, shape: tuple[int, int] = (530, 260)) -> kernels.Prepared:
    matrix = raw_matrix(kernel, 3, 64, shape, torch.Generator().manual_seed(2))
    return kernels.prepare(matrix, kernel, activation(kernel))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kernel", NATIVE)
def test_the_bits_depend_on_no_thread_and_on_the_batch_only_below_3(kernel: str) -> None:
    matrix = prepared(kernel)
    x = torch.randn(37, 260)
    kernels.set_threads(1)
    expected = matrix(x)
    for count in (2, 3, 8):
        kernels.set_threads(count)
        assert torch.equal(matrix(x), expected)
    for tokens in (3, 4, 5, 6, 8, 9, 35):
        assert torch.equal(matrix(x[:tokens]), expected[:tokens])
    assert torch.equal(matrix(x[:2]), torch.cat([matrix(x[:1]), matrix(x[1:2])]))


@needs_native
@pytest.mark.usefixtures("threads")
def test_calls_from_many_threads_do_not_meet() -> None:
    kernels.set_threads(2)
    matrix = prepared(NATIVE[0])
    x = torch.randn(64, 1, 260)
    expected = torch.stack([matrix(token) for token in x])
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert torch.equal(torch.stack(list(pool.map(matrix, x))), expected)


@needs_native
@pytest.mark.usefixtures("threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes() -> None:
    kernels.set_threads(2)
    matrix = prepared(NATIVE[0])
    x = torch.randn(2, 260)
    expected = matrix(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(matrix(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kernel", [*XNOR_ROWS, *ROWS])
def test_a_copy_outlives_its_original(kernel: str) -> None:
    matrix = prepared(kernel, (33, 97))
    x = torch.randn(2, 97)
    expected, twin = matrix(x), copy.deepcopy(matrix)
    del matrix
    torch.full((64, 97), torch.nan)
    assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("kernel", [*XNOR_ROWS, *ROWS])
def test_gradients_are_those_of_the_dequantized_weight(kernel: str) -> None:
    matrix = prepared(kernel, (33, 97))
    weight = matrix.qtensor().dequantize()
    x, bias = torch.randn(2, 3, 97, requires_grad=True), torch.randn(33, requires_grad=True)
    upstream = torch.randn(2, 3, 33)
    matrix(x, bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("kernel", [*XNOR_ROWS, *ROWS])
def test_no_token_gives_no_row(kernel: str) -> None:
    assert prepared(kernel, (33, 97))(torch.empty(2, 0, 97)).shape == (2, 0, 33)


INPUTS = (
    "int8/channel/sym",
    "int8/g48/asym",
    "int4/g32/sym",
    "int8/tensor",
    "int8/static/asym/s0.02/z200",
    "nf4/g64",
    "mxfp4",
    "nvfp4",
    "sign/channel",
)


@pytest.mark.parametrize("spelling", ["int4/g32/sym", "int8/channel/asym", "nf4/g64", "palette2/row", "sign/channel"])
@pytest.mark.parametrize("inputs", INPUTS)
def test_no_token_gives_no_row_whatever_it_is_rounded_to(spelling: str, inputs: str) -> None:
    matrix = methods.rtn(torch.randn(33, 97, generator=torch.Generator().manual_seed(4)), formats.parse(spelling))
    for kernel in (None, "reference"):
        ready = kernels.prepare(matrix, kernel, formats.parse(inputs))
        for dtype in (torch.float32, torch.bfloat16):
            y = ready(torch.empty(2, 0, 97, dtype=dtype), torch.ones(33))
            assert y.shape == (2, 0, 33) and y.dtype == dtype
            assert ready.inputs(torch.empty(0, 97, dtype=dtype)).shape == (0, 97)
        x = torch.empty(0, 97, requires_grad=True)
        ready(x).sum().backward()
        assert x.grad is not None and x.grad.shape == (0, 97)


@pytest.mark.parametrize("kernel", [*XNOR_ROWS, *ROWS])
def test_x_is_what_it_stands_for_however_it_lies(kernel: str) -> None:
    matrix, x = prepared(kernel, (33, 97)), torch.randn(5, 97)
    expected = matrix(x)
    assert torch.equal(matrix(torch._neg_view(-x)), expected)  # memory holds -x
    assert torch.equal(matrix(torch.complex(torch.zeros(5, 97), -x).conj().imag), expected)
    assert torch.equal(matrix(x.T.contiguous().T), expected)
    wide = x[:, 3:4].expand(5, 97)
    assert torch.equal(matrix(wide), matrix(wide.contiguous()))
    assert torch.equal(matrix(x[2]), matrix(x[2:3])[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_graph_of_a_kernel_is_refused_and_torch_compile_runs_between_graphs() -> None:
    matrix, x = prepared(ROWS[0], (33, 97)), torch.randn(5, 97)
    layer = torch.nn.Module()
    layer.forward = lambda x: matrix(x).relu()  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r"torch\.compile works"):
        torch.jit.trace(layer, (x,), check_trace=False)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(UnsupportedError, match="FakeTensor"):
        matrix(mode.from_tensor(x))
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(UnsupportedError, match="FakeTensor"):
        kernels.embedding(mode.from_tensor(torch.arange(3)), matrix.qtensor())
    with pytest.raises(UnsupportedError, match="sparse_coo"):
        matrix(x.to_sparse())
    compiled = torch.compile(layer.forward, backend="eager")
    assert torch.equal(compiled(x), layer(x)) and torch.equal(compiled(x[:3]), layer(x[:3]))


@pytest.mark.parametrize("spelling", formats.EXAMPLES)
def test_nothing_is_lost_and_rows_can_be_looked_up(spelling: str) -> None:
    weight = torch.randn(37, 512, generator=torch.Generator().manual_seed(3))
    format = formats.parse(spelling).bind(weight)
    params = F.fit(format, weight)
    matrix = QTensor.of(format, F.encode(format, weight, params), params, rows=37)
    ready = kernels.prepare(matrix)
    codes, back = ready.qtensor().logical()
    assert torch.equal(codes, matrix.packed)
    assert all(torch.equal(back[name], params[name].expand_as(back[name])) for name in params)
    assert ready.nbytes >= matrix.repack(layouts.DENSE).nbytes
    ids = torch.tensor([[0, 36, 5], [5, 5, 17]])
    rows = matrix.dequantize()[ids]
    for stored in (matrix, ready.qtensor(), *_repacked(matrix)):
        assert torch.equal(kernels.embedding(ids, stored), rows), stored.layout.name
        assert kernels.embedding(ids[:, :0], stored).shape == (2, 0, 512)
    assert kernels.embedding(ids, matrix, torch.bfloat16).dtype == torch.bfloat16
    for none in (torch.tensor([1.7]), torch.tensor([True])):
        with pytest.raises(InputError, match="no integers"):
            kernels.embedding(none, matrix)
    for wrong in (37, -1):
        with pytest.raises(IndexError, match="37 rows"):
            kernels.embedding(torch.tensor([wrong]), matrix)


@needs_native
@pytest.mark.parametrize(
    "family",
    ["int24_linear", "int24_lut_linear", "int8_linear", "int8_lut_linear", "int8_row_lut_linear", "int8_vector_linear"],
)
def test_kernels_of_integers_agree_bit_for_bit(family: str) -> None:
    x = torch.randn(9, 260, generator=torch.Generator().manual_seed(4))
    found = [prepared(name)(x) for name in NATIVE if name.startswith(family)]
    few = family.startswith(("int24", "int8_row_lut", "int8_vector"))  # not on every instruction set
    assert len(found) >= (1 if few else 2)
    assert all(torch.equal(y, found[0]) for y in found)
    assert torch.equal(found[0], torch.cat([prepared(f"{family}_serial")(token) for token in x.split(1)]))


@needs_native
@pytest.mark.parametrize("kernel", [name for name in NATIVE if name.startswith("int24_linear")])
def test_fixed_point_is_what_the_kernel_multiplies_and_as_close_as_it_says(kernel: str) -> None:
    """By a matrix that hands inputs through; bfloat16 down to 2^-14 of the largest is exact."""
    one = QTensor.of(
        formats.parse("int8/channel/sym"),
        torch.eye(64, dtype=torch.uint8) + 128,
        {"scale": torch.ones(64, 1, 1, dtype=torch.float16)},
    )
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 64, generator=generator) * torch.exp2(torch.randint(-90, 90, (40, 1), generator=generator))
    edges = torch.tensor([1 - 2.0**-7, 1 - 2.0**-8, 1.0, 2.0**-22, 2.0**-23, -(2.0**-23), 1e-44, 0.0]).repeat(8)
    x = torch.cat([x, edges[None], edges[None] * 3e38, edges[None] * 1e-38])
    ready = kernels.prepare(one, kernel)
    found, most = ready(x), x.abs().amax(1, keepdim=True)
    assert torch.equal(found, ready.inputs(x)) and torch.equal(found, kernels.reference.int24(x))
    assert bool(((found.double() - x.double()).abs() <= (most.double() * 2.0**-22).clamp_min(2.0**-127)).all())
    small = (torch.rand(9, 64, generator=generator) + 2.0**-14).to(torch.bfloat16).float()
    assert torch.equal(ready(small), small)
    poisoned = torch.ones(4, 64)
    poisoned[1, 3], poisoned[2, 5] = torch.inf, torch.nan
    assert ready(poisoned).isnan().all(1).tolist() == [False, True, True, False]
    assert kernels.reference.int24(poisoned).isnan().all(1).tolist() == [False, True, True, False]


@needs_native
def test_integers_round_activations_as_their_format_does() -> None:
    format = formats.parse("int8/channel/sym")
    one = QTensor.of(
        formats.parse("int8/channel/sym"),
        torch.eye(64, dtype=torch.uint8) + 128,
        {"scale": torch.ones(64, 1, 1, dtype=torch.float16)},
    )
    x = torch.cat([torch.randn(5, 64), torch.linspace(-1, 1, 64)[None], torch.full((1, 64), 3e5), torch.zeros(1, 64)])
    expected = kernels.reference.round_activations(x, format)
    assert torch.equal(kernels.linear(x, one, activation=format), expected)


def _repacked(matrix: QTensor) -> list[QTensor]:
    """``matrix`` in every layout that takes it."""
    return [matrix.repack(x) for x in layouts.LAYOUTS if x.refuse(matrix.format, matrix.shape) is None]


LAYOUTS_OF_ROWS = [("int3/g32", "tile16"), ("int3/channel", "halves16"), ("int1/channel", "bytes16")]
LAYOUTS_OF_ROWS += [("palette3/row", "row16"), ("palette3/row", "rowhalves16"), ("vector4x6", "column8")]


@needs_native
@pytest.mark.parametrize(
    ("spelling", "name"), [*LAYOUTS_OF_ROWS, ("vector4x6", "vector16"), ("vector8x12", "vector16")]
)
def test_bytes_of_another_size_or_kind_are_refused_and_any_strides_are_read(spelling: str, name: str) -> None:
    layout = {one.name: one for one in (*table.LAYOUTS.values(), *table.ARRANGED.values())}[name]
    weight = methods.rtn(torch.randn(40, 160, generator=torch.Generator().manual_seed(4)), formats.parse(spelling))
    held, x, inputs = weight.repack(layout), torch.randn(5, 160), activation("int8")
    expected = kernels.prepare(weight, None, inputs)(x)
    packed = held.packed
    for wrong in (packed[:, :-1], packed[:-1], packed[:, :1].contiguous(), packed.to(torch.int16), packed.flatten()):
        with pytest.raises(InputError, match="codes"):
            kernels.prepare(replace(held, packed=wrong), None, inputs)
        with pytest.raises((InputError, IndexError)):
            kernels.embedding(torch.tensor([39]), replace(held, packed=wrong))
    apart = torch.stack([packed, ~packed], 2)[:, :, 0]
    for strided in (apart, packed.T.contiguous().T):
        assert torch.equal(kernels.prepare(replace(held, packed=strided), None, inputs)(x), expected)


@needs_native
@pytest.mark.parametrize("inputs", [None, "int8/channel"])
@pytest.mark.parametrize("spelling", ["palette4", "palette6", "palette3/row", "palette4/rows16", "vector4x6"])
def test_a_table_that_is_not_finite_is_refused(spelling: str, inputs: str | None) -> None:
    weight = methods.rtn(torch.randn(32, 64, generator=torch.Generator().manual_seed(5)), formats.parse(spelling))
    name = next(iter(weight.format.params)).name
    for wrong in (torch.nan, torch.inf):
        levels = weight.params[name].clone()
        levels[..., -1] = wrong
        with pytest.raises(InputError, match="NaN or infinity"):
            spoilt = replace(weight, params={**weight.params, name: levels})
            kernels.prepare(spoilt, None, None if inputs is None else formats.parse(inputs))


@needs_native
@pytest.mark.parametrize("kernel", NATIVE[-1:])
def test_a_tangent_of_forward_mode_is_refused_not_dropped(kernel: str) -> None:
    matrix, x = prepared(kernel), torch.randn(2, 260)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward AD|jvp"):
        matrix(forward_ad.make_dual(x, torch.ones_like(x)))
    assert torch.equal(matrix(x), matrix(x.clone()))


@pytest.mark.filterwarnings("ignore:fewbit runs on its slow reference")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("inputs", ["int8/channel", "int8/g16", "int4/channel", "int8/g64/asym", "mxfp4", "nf4/g64"])
def test_rounded_infinity_is_nan_in_its_token_and_no_large_number(inputs: str, value: float) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    x[1, 5] = value
    others = [0, 2, 3, 4]
    for spelling in ("int4/g32", "palette4/row", "vector4x6"):
        matrix = methods.rtn(torch.randn(32, 64, generator=torch.Generator().manual_seed(6)), formats.parse(spelling))
        for kernel in (None, "reference"):
            ready = kernels.prepare(matrix, kernel, formats.parse(inputs))
            y = ready(x)
            assert bool(y[1].isnan().all()) and bool(ready.inputs(x)[1].isnan().any()), (spelling, ready.kernel)
            assert torch.allclose(y[others], ready(x[others]), atol=1e-5), (spelling, ready.kernel)
