# SPDX-License-Identifier: Apache-2.0
"""Sums of terms: law 2 against float64, with a bound that follows the computation step by step; and the same bits as
the parts computed one by one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from kernel_cases import FAMILIES, FLOAT_ROWS, SIZES, activation, raw_matrix, signs
from raw_format import exact
from torch import Tensor

from fewbit import formats, kernels
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.kernels import native
from fewbit.kernels.decoded import DECODED

EPS = 2.0**-24
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SPARSE_ROWS = [row for row in kernels.SPARSE_KERNELS if row.refuse() is None]
BESIDE = {row.name: next(k for k in FLOAT_ROWS if k.endswith(str(row.isa)) or row.name == k) for row in SPARSE_ROWS}
"""A row of the kernel table, of affine weights, that brings each row for sparse entries along."""
needs_native = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

Sized = tuple[Tensor, Tensor]
"""A float64 result, and how far float32 may be from it."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    kernels.set_threads(None)


def matrix_times(matrix: QTensor, x: Sized) -> Sized:
    found, (value, error) = exact(matrix), x
    operations = found.operations if value.shape[0] < DECODED else max(found.operations, matrix.shape[1] + 12)
    size = (value.abs() + error) @ found.magnitude.T
    return value @ found.weight.T, error @ found.weight.abs().T + EPS * operations * size


def scaled(x: Sized, scale: Tensor | None) -> Sized:
    if scale is None:
        return x
    value, error = x[0] * scale.double(), x[1] * scale.double().abs()
    return value, error + EPS * (value.abs() + error)


def added(a: Sized, b: Sized) -> Sized:
    return a[0] + b[0], (a[1] + b[1]) * (1 + EPS) + EPS * (a[0] + b[0]).abs()


def times(term: Term, x: Sized) -> Sized:
    """``x W^T`` with what each operation in float32 may add to its error."""
    if isinstance(term, Dense):
        return matrix_times(term.qtensor, x)
    if isinstance(term, Product):
        return matrix_times(term.left, scaled(matrix_times(term.right, x), term.middle))
    if isinstance(term, Columns):
        starts = itertools.accumulate((part.shape[1] for part in term.parts), initial=0)
        order = [term.permutation.long()[at : at + part.shape[1]] for at, part in zip(starts, term.parts, strict=False)]
        parts = [times(part, (x[0][:, at], x[1][:, at])) for at, part in zip(order, term.parts, strict=True)]
    elif isinstance(term, Sparse):
        weight, (value, error) = term.dequantize().double(), x
        operations = term.pointers.long().diff() + 2
        size = (value.abs() + error) @ weight.abs().T
        return value @ weight.T, error @ weight.abs().T + EPS * operations * size
    else:
        assert isinstance(term, Terms)
        x = scaled(x, term.column_scale)
        parts = [times(part, x) for part in sorted(term.terms, key=lambda part: isinstance(part, Sparse))]
    total = parts[0]
    for part in parts[1:]:
        total = added(total, part)
    return scaled(total, term.row_scale) if isinstance(term, Terms) else total


def check(terms: Terms, x: Tensor, bias: Tensor | None, rows: Iterable[str]) -> None:
    flat = x.double().reshape(-1, terms.shape[1])
    answer, bound = times(terms, (flat, torch.zeros_like(flat)))
    if bias is not None:
        answer, bound = added((answer, bound), (bias.double().expand_as(answer), torch.zeros_like(answer)))
    bound = bound + ROUNDING[x.dtype] * (answer.abs() + bound)
    for row in rows:
        y = kernels.prepare(terms, row)(x, bias)
        assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], terms.shape[0])
        error = (y.double().reshape(answer.shape) - answer).abs()
        assert bool((error <= bound).all()), (row, terms.shape, x.shape, float((error - bound).max()))


def sparse(shape: tuple[int, int], generator: torch.Generator, share: float = 0.1, dtype: str = "float16") -> Sparse:
    """Random entries; one row of eight has none, one of eight is full."""
    kind = torch.randint(0, 8, (shape[0], 1), generator=generator)
    here = torch.rand(shape, generator=generator) < torch.where(kind == 0, 0.0, torch.where(kind == 1, 1.0, share))
    values = torch.randn(shape, generator=generator)
    return Sparse.of(torch.where(here, values, 0.0), getattr(torch, dtype))


def every_kind(kernel: str, shape: tuple[int, int], generator: torch.Generator) -> list[Terms]:
    """Each term alone and with others, with scales and without."""
    rows, columns = shape
    rank = (rows + columns) // 2

    def matrix(rows: int, columns: int) -> QTensor:
        return raw_matrix(kernel, 3, 32, (rows, columns), generator)

    def scale(length: int) -> Tensor:
        return torch.randn(length, generator=generator)

    dense, few = Dense(matrix(rows, columns)), sparse(shape, generator)
    product = Product(matrix(rows, rank), scale(rank).bfloat16(), matrix(rank, columns))
    part = -(-columns // 3)
    order = torch.randperm(columns, generator=generator).to(torch.int32)
    halves: tuple[Term, ...] = (Dense(matrix(rows, part)),)
    if columns > part:
        inner = sparse((rows, columns - part), generator, dtype="float32")
        halves = (*halves, Terms(inner.shape, (inner,), scale(rows)))
    return [
        Terms(shape, (few,)),
        Terms(shape, (few, dense)),
        Terms(shape, (product,), scale(rows).half(), scale(columns)),
        Terms(shape, (dense, few, dense), None, scale(columns).half()),
        Terms(shape, (Columns(order, halves), product), scale(rows)),
        Terms(shape, (Terms(shape, (dense, few), scale(rows), scale(columns)), Product(*factors(product)), few)),
    ]


def factors(product: Product) -> tuple[QTensor, None, QTensor]:
    return product.left, None, product.right


@pytest.mark.parametrize("kernel", [family for family in FAMILIES if not family.startswith("int8")])
def test_every_kind_of_term_on_odd_shapes(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, shape in enumerate(itertools.product(SIZES, SIZES)):
        x = torch.randn((1, 2, 3, 8, 9, 50)[number % 6], shape[1], generator=generator)
        bias = torch.randn(shape[0], generator=generator) if number % 2 else None
        for terms in every_kind(kernel, shape, generator):
            check(terms, x, bias, FAMILIES[kernel])


@pytest.mark.parametrize("batch", [1, 2, 3, 9, 17])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_dtypes_strides_and_unaligned_rows(dtype: torch.dtype, batch: int) -> None:
    generator, rows = torch.Generator().manual_seed(batch), BESIDE.values()
    whole = torch.randn(2 * batch, 203, generator=generator).to(dtype)
    bias = torch.randn(33, generator=generator).to(dtype)
    for terms in every_kind("reference", (33, 97), generator):
        check(terms, whole[::2, 1:98], bias, rows)
        check(terms, whole[:1, 3:100].expand(batch, 97), None, rows)
        check(terms, whole[:batch, 1:195:2], bias, rows)
        check(terms, torch.randn(97, batch + 1, generator=generator).to(dtype)[:, 1:].T, None, rows)
        check(terms, whole[:, 1:98].reshape(2, batch, 97), bias, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [name for name in BESIDE.values() if name != "reference"])
def test_results_of_16_bits_are_rounded_once(kernel: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(33, generator=generator).to(dtype)
    for terms in every_kind(kernel, (33, 97), generator):
        ready = kernels.prepare(terms, kernel)
        for x in (torch.randn(1, 97).to(dtype), torch.randn(9, 97).to(dtype)):
            assert torch.equal(ready(x, bias), ready(x.float(), bias.float()).to(dtype))


@pytest.mark.parametrize("row", SPARSE_ROWS, ids=lambda row: row.name)
def test_sparse_entries_of_every_size_and_count(row: kernels.SparseKernel) -> None:
    """Whole windows and ragged ones, no entry at all, indices of 32 bits, halves and floats, subnormal and huge."""
    generator = torch.Generator().manual_seed(1)
    for shape, share in [((1, 1), 1.0), ((5, 3), 0.0), ((256, 64), 0.2), ((530, 33), 0.1), ((3, 65_535), 1e-3)]:
        check(Terms(shape, (sparse(shape, generator, share),)), torch.randn(4, shape[1]), None, [BESIDE[row.name]])
    for columns in (65_535, 65_536, 70_000):
        ends = Sparse.at((2, columns), torch.tensor([0, 1]), torch.tensor([columns - 1, 0]), torch.tensor([2.0, 3.0]))
        x = torch.randn(3, columns)
        y = kernels.prepare(Terms(ends.shape, (ends,)), BESIDE[row.name])(x)
        assert torch.equal(y, torch.stack([2 * x[:, -1], 3 * x[:, 0]], 1))
    none = kernels.prepare(Terms((9, 31), (Sparse.of(torch.zeros(9, 31)),)), BESIDE[row.name])
    assert torch.equal(none(torch.randn(9, 31)), torch.zeros(9, 9))


@pytest.mark.parametrize("row", SPARSE_ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zeros_denormals_and_huge_entries(row: kernels.SparseKernel, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    for scale in (0.0, 2.0**-24, 65504.0) if dtype == torch.float16 else (0.0, 1e-40, 1e30):
        entries = sparse((40, 97), generator)
        held = Sparse((40, 97), entries.pointers, entries.columns, (entries.values.float().sign() * scale).to(dtype))
        for size in (0.0, 1e-42, 1.0, 1e4):
            x = torch.randn(9, 97, generator=generator) * size
            y = kernels.prepare(Terms((40, 97), (held,)), BESIDE[row.name])(x)
            answer, bound = times(held, (x.double(), torch.zeros(9, 97).double()))
            least = (held.pointers.long().diff() + 2) * 2.0**-149  # a product below the least float32 may vanish
            assert bool(((y.double() - answer).abs() <= bound + EPS * answer.abs() + least).all()), (scale, size)


@pytest.mark.parametrize("row", SPARSE_ROWS, ids=lambda row: row.name)
def test_infinity_and_nan_reach_only_rows_with_an_entry_there(row: kernels.SparseKernel) -> None:
    entries = sparse((530, 40), torch.Generator().manual_seed(3))
    ready = kernels.prepare(Terms((530, 40), (entries,)), BESIDE[row.name])
    touched = entries.dequantize()[:, [0, 39]].ne(0).any(1)
    for tokens in (1, 9):
        x = torch.ones(tokens, 40)
        x[:, 0], x[:, 39] = torch.inf, torch.nan
        assert torch.equal(~ready(x).isfinite(), touched.expand(tokens, 530))


@needs_native
@pytest.mark.parametrize("kernel", [name for name in FLOAT_ROWS if name != "reference"])
def test_the_bits_depend_on_no_thread(kernel: str) -> None:
    generator = torch.Generator().manual_seed(4)
    shape = (530, 1060)
    dense, few = Dense(raw_matrix(kernel, 3, 64, shape, generator)), sparse(shape, generator, 0.2)
    ready = kernels.prepare(Terms(shape, (dense, few), torch.randn(530), torch.randn(1060)), kernel)
    for tokens in (1, 9, 33):
        x = torch.randn(tokens, 1060, generator=generator)
        kernels.set_threads(1)
        expected = ready(x)
        for count in (2, 3, 8):
            kernels.set_threads(count)
            assert torch.equal(ready(x), expected)


@needs_native
def test_native_rows_of_sparse_entries_agree_bit_for_bit_alone_and_together() -> None:
    generator = torch.Generator().manual_seed(5)
    terms = Terms((530, 260), (sparse((530, 260), generator),))
    x = torch.randn(19, 260, generator=generator)
    found = [kernels.prepare(terms, BESIDE[row.name]) for row in SPARSE_ROWS if row.isa]
    expected = found[0](x)
    for ready in found:
        assert torch.equal(ready(x), expected)
        assert torch.equal(torch.cat([ready(token) for token in x.split(1)]), expected)


@pytest.mark.parametrize("inputs", ["int8/channel/sym", "int8/g32/sym", "sign/channel"])
def test_activations_are_rounded_where_a_matrix_is_multiplied(inputs: str) -> None:
    """The bits of the parts by hand: what each quantized matrix sees is rounded; sparse entries see x itself."""
    generator = torch.Generator().manual_seed(6)
    rounding = formats.parse(inputs)
    dense, left, right = (signs(shape, generator) for shape in [(96, 128), (96, 64), (64, 128)])
    middle, few, bias = torch.randn(64), sparse((96, 128), generator), torch.randn(96)
    row_scale, column_scale = torch.randn(96), torch.randn(128)
    terms = Terms((96, 128), (Dense(dense), Product(left, middle, right), few), row_scale, column_scale)
    ready = kernels.prepare(terms, activation=rounding)
    a, b, c = (kernels.prepare(matrix, activation=rounding) for matrix in (dense, left, right))
    for x in (torch.randn(1, 128, generator=generator), torch.randn(9, 128, generator=generator)):
        scaled_x = x * column_scale
        y = a(scaled_x) + b(c(scaled_x) * middle)
        y = (y + kernels.prepare(Terms((96, 128), (few,)))(scaled_x)) * row_scale + bias
        assert torch.equal(ready(x, bias), y)
        assert ready.activation is rounding and not torch.equal(kernels.prepare(terms)(x, bias), y)
    assert ready.kernel == " + ".join(dict.fromkeys([a.kernel, c.kernel, kernels.choose_sparse().name]))


@pytest.mark.parametrize("row", [row for row in kernels.KERNELS if row.isa in native.isas()], ids=lambda row: row.name)
def test_every_row_brings_a_row_for_sparse_entries_along(row: kernels.Kernel) -> None:
    assert kernels.choose_sparse(row).refuse() is None


@pytest.mark.parametrize("kernel", BESIDE.values(), ids=BESIDE)
def test_gradients_are_those_of_the_dequantized_weight(kernel: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for terms in every_kind(kernel, (33, 97), generator):
        ready, weight = kernels.prepare(terms, kernel), terms.dequantize()
        x, bias = torch.randn(2, 3, 97, requires_grad=True), torch.randn(33, requires_grad=True)
        upstream = torch.randn(2, 3, 33)
        ready(x, bias).backward(upstream)
        torch.testing.assert_close(x.grad, upstream @ weight, rtol=1e-4, atol=1e-4 * float(weight.abs().max()))
        torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
        assert ready.backward(upstream.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", BESIDE.values(), ids=BESIDE)
def test_a_copy_outlives_its_original_and_no_token_gives_no_row(kernel: str) -> None:
    generator = torch.Generator().manual_seed(8)
    for terms in every_kind(kernel, (33, 97), generator):
        ready = kernels.prepare(terms, kernel)
        x = torch.randn(2, 97)
        expected, twin = ready(x), copy.deepcopy(ready)
        del ready
        torch.full((64, 97), torch.nan)
        assert torch.equal(twin(x), expected)
        assert twin(torch.empty(2, 0, 97)).shape == (2, 0, 33)


@needs_native
def test_what_was_chosen_is_named_and_what_cannot_run_is_refused() -> None:
    generator = torch.Generator().manual_seed(9)
    dense, few = signs((33, 97), generator), sparse((33, 97), generator)
    terms = Terms((33, 97), (few, Dense(dense), Product(signs((33, 7), generator), None, signs((7, 97), generator))))
    for row in SPARSE_ROWS:
        ready = kernels.prepare(terms, "reference" if row.isa is None else f"affine_linear_{row.isa}")
        first = "reference" if row.isa is None else f"affine_linear_{row.isa}"
        share = few.values.numel() / (33 * 97)
        assert ready.names == (
            ("sign/channel", first),
            ("sign/channel, rank 7", first),
            ("sign/channel, rank 7", first),
            (f"sparse, {share:.2%} of entries", row.name),
        )
        assert ready.kernel == " + ".join(dict.fromkeys([first, row.name]))
        assert ready.nbytes >= ready.read_bytes > 0
    with pytest.raises(SpecError, match="none of that name"):
        kernels.prepare(terms, "affine_linear_abacus")
    with pytest.raises(UnsupportedError, match="lut family"):
        kernels.prepare(terms, next((k for k in FLOAT_ROWS if k.startswith("lut")), "lut_linear_serial"))
    ready = kernels.prepare(terms, "reference")
    with pytest.raises(InputError, match="97"):
        ready(torch.randn(2, 96))
    with pytest.raises(InputError, match="bias"):
        ready(torch.randn(2, 97), torch.randn(32))
    with pytest.raises(UnsupportedError, match="float64"):
        ready(torch.randn(2, 97).double())


def test_terms_stand_beside_matrices_in_one_call() -> None:
    generator = torch.Generator().manual_seed(10)
    inputs = activation("reference")
    matrix = raw_matrix("reference", 3, 32, (17, 97), generator)
    ready = [kernels.prepare(matrix, "reference", inputs)]
    many = [*ready, *(kernels.prepare(terms, "reference") for terms in every_kind("reference", (33, 97), generator))]
    x = torch.randn(3, 97, generator=generator)
    for y, each in zip(kernels.linear_many(x, many, [None] * len(many)), many, strict=True):
        assert torch.equal(y, each(x))


def test_without_the_native_module_torch_adds_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(11)
    terms = every_kind("reference", (33, 97), generator)[1]
    monkeypatch.setattr(native, "_load", lambda: (None, "there is no compiler on the moon"))
    monkeypatch.setattr(native, "capabilities", lambda: 0)
    assert kernels.choose_sparse().name == "reference"
    assert str(kernels.SPARSE_KERNELS[0].refuse()).endswith("moon")
    with pytest.warns(RuntimeWarning, match="no compiler on the moon"):
        ready = kernels.prepare(terms)
    assert ready.kernel == "reference"
    x = torch.randn(3, 97, generator=generator)
    torch.testing.assert_close(ready(x).double(), x.double() @ terms.dequantize().double().T, rtol=0, atol=1e-3)


@needs_native
def test_the_core_refuses_what_contradicts_itself() -> None:
    numbers = torch.zeros(9, dtype=torch.int64)
    at = numbers.data_ptr()
    good, given = (8, 8, 2, 1, at, at, at, at), (at, 1, 8, 1, 0)
    native.core().sparse_add(good, given, at, 8, 1, 1)
    for place, value in [(0, 0), (1, -1), (1, 65_536), (2, 3), (4, 0), (5, 0)]:
        bad = (*good[:place], value, *good[place + 1 :])
        with pytest.raises(ValueError, match="contradict"):
            native.core().sparse_add(bad, given, at, 8, 1, 1)  # type: ignore[arg-type]
    for x, y, stride, threads in [(given, 0, 8, 1), ((at, 2, 8, 1, 0), at, 7, 1), (given, at, 8, 0)]:
        with pytest.raises(ValueError, match="contradict"):
            native.core().sparse_add(good, x, y, stride, 1, threads)
    with pytest.raises(RuntimeError, match="instruction set"):
        native.core().sparse_add(good, given, at, 8, 1 << 20, 1)  # of no instruction set
