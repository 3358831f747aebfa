# SPDX-License-Identifier: Apache-2.0
"""The laws over the whole table: every format x every method x every layout, on small odd shapes.

1. ``encode(decode(q)) == q`` for every code, with the parameters that a method chose.
4. Codes and parameters survive any change of layout, through any chain, bit for bit; a refusal is a sentence.
5. Stored bits are counted from real bytes and are at most the formula of the format plus the padding of rows.

And against float64 definitions written here, apart from the code: ``decode``, nearest codes by brute force, fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewbit import formats, layouts, methods
from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core import terms as T
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.layout import Layout
from fewbit.core.method import Method
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Terms
from fewbit.errors import UnsupportedError
from fewbit.formats.dynamic import DYNAMIC
from fewbit.formats.table import TABLES

SHAPES = ((1, 1), (5, 33), (7, 97), (16, 64))
"""Odd ones, and one that most word layouts accept."""
SPANS = (32, 256)
"""What ggml's structs and 3-bit words accept, checked once per format."""

NAMES = (*formats.EXAMPLES, "int4/g32/sym", "int8/g32/sym", "int4/g16/asym", "int3/g32/sym", "pot4/channel")
SCALARS = tuple(name for name in NAMES if formats.parse(name).height == 1)
"""Those whose codes stand for one weight; tests/formats/test_vector.py says of others what is said here of these."""

TAKEN = [(name, method) for name in NAMES for method in methods.METHODS if method.refuse(formats.parse(name)) is None]
"""Formats, and the methods that take them."""

EPS = 2.0**-24
"""Relative rounding error of float32."""

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def facts_of(columns: int, seed: int = 5, rows: int = 1) -> Facts:
    scale = torch.logspace(-1, 1, columns)
    found = Facts.of(normal(3 * columns + 8, columns, seed) * scale, gram=True)
    return replace(found, fisher=normal(rows, columns, seed).square() * scale)


def matrices(method: Method, result: QTensor | Terms, format: Format, shape: tuple[int, int]) -> list[QTensor]:
    """What of a method's result are matrices; they have the formats and shapes that it said they would have."""
    found, made = T.matrices(result), method.made_of(format, shape, {})
    assert result.shape == shape and made.sum == isinstance(result, Terms)
    assert [(matrix.format.name, matrix.shape) for matrix in found] == [(f.name, size) for f, size in made.matrices]
    assert result.nbytes - sum(matrix.nbytes for matrix in found) == made.beside
    return found


HOSTILE: dict[str, Callable[[int, int], torch.Tensor]] = {
    "zeros": lambda r, c: torch.zeros(r, c),
    "constant": lambda r, c: torch.full((r, c), 0.7),
    "negative constant": lambda r, c: torch.full((r, c), -1000.3),
    "huge": lambda r, c: torch.where(normal(r, c) > 0, 3e38, -3e38),
    "denormal": lambda r, c: normal(r, c) * 1e-41,
    "one outlier": lambda r, c: normal(r, c).index_fill(1, torch.tensor([c // 2]), 1e6),
    "tiny among zeros": lambda r, c: torch.zeros(r, c).index_fill(1, torch.tensor([c - 1]), -1e-30),
}


def value_of(format: Format, params: dict[str, np.ndarray]) -> np.ndarray:
    """Every value of every block in float64, (rows, blocks, levels), from the formats' definitions."""
    codes = np.arange(format.levels, dtype=np.float64)
    kind, _, rest = format.name.partition("/")
    p = {key: value.astype(np.float64) for key, value in params.items()}
    if kind.startswith("palette"):
        return p.get("scale", 1.0) * p.get("table_scale", 1.0) * p["table"][:, :, 0]
    if kind.startswith("int") and "super_scale" in p and rest.endswith(("s4", "s5", "s6", "s7", "s8")):
        scale_bits = int(rest[-1])
        if "/sym/" in rest:
            scale = p["super_scale"] * (p["scale_code"] - 2.0 ** (scale_bits - 1))
            return scale * (codes - format.levels / 2)
        return p["super_scale"] * p["scale_code"] * codes - p["super_minimum"] * p["minimum_code"]
    if kind.startswith("int") and rest.endswith("min"):
        return p["scale"] * codes + p["minimum"]
    if kind.startswith("int"):
        middle = 0.5 if format.levels == 2 else format.levels / 2
        return p["scale"] * (codes - p.get("zero_point", middle))
    if kind == "sign":
        return p["scale"] * (2 * codes - 1)
    if kind == "ternary":
        return p["scale"] * (codes - 1)
    table = np.array(TABLES["fp4" if kind in ("mxfp4", "nvfp4") else kind])
    if kind == "mxfp4":
        return np.exp2(p["exponent"] - 127) * table
    if kind == "nvfp4":
        block = params["block_scale"]
        exponent, mantissa = (block >> 3).astype(int), (block & 7) / 8.0
        e4m3 = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * np.exp2(exponent - 7.0))
        return e4m3 / p["global_scale"] * table
    if rest.endswith("dq"):
        coded = p["scale_mean"] + p["super_scale"] * np.array(DYNAMIC)[params["scale_code"]]
        return np.maximum(coded, 2.0**-24) * table
    return p["scale"] * table


def magnitude_of(format: Format, params: dict[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """What float32 adds up to get a value, per block: the bound of its rounding error is a few EPS of this."""
    top = np.abs(values).max(-1, keepdims=True)
    return top + np.abs(values[..., :1] - values[..., -1:])


def numpy_of(params: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in params.items()}


def check_law_1(format: Format, params: dict[str, torch.Tensor], context: str) -> None:
    """Every code of every block, as if each block were as long as there are codes. Vectors of a book may be equal: then
    their values come back."""
    blocks = next(iter(params.values())).shape[:2]
    codes = torch.arange(format.levels, dtype=F.code_dtype(format)).expand(*blocks, format.levels)
    values = format.decode(codes, params)
    assert bool(values.isfinite().all()), context
    back = format.encode(values, params)
    if format.height == 1:
        assert torch.equal(back, codes), context
    elif "residual" not in params:
        assert torch.equal(format.decode(back, params), values), context


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda row: row.name)
def test_a_method_says_why_it_does_not_take_a_format(method: Method) -> None:
    for name in (name for name in NAMES if (name, method) not in TAKEN):
        with pytest.raises(UnsupportedError) as raised:
            method(normal(8, 32), formats.parse(name), facts_of(32))
        assert str(method.refuse(formats.parse(name))) in str(raised.value)


@pytest.mark.parametrize(("name", "method"), TAKEN, ids=lambda value: value if isinstance(value, str) else value.name)
def test_laws_1_4_and_5_of_every_method_in_every_layout(name: str, method: Method) -> None:
    format = formats.parse(name)
    # What a method chose does not matter to a layout: one method fills every shape and ggml's spans, another one shape.
    layout_shape = SHAPES[(NAMES.index(name) + methods.METHODS.index(method)) % len(SHAPES)]
    made = {}
    for shape in (*SHAPES, SPANS) if method.name == "rtn" else SHAPES:
        result = method(normal(*shape, seed=sum(shape)), format, facts_of(shape[1], rows=shape[0]))
        made[shape] = result
        for tensor in matrices(method, result, format, shape):
            codes, params = tensor.logical()
            assert codes.dtype == F.code_dtype(tensor.format)
            assert int(codes.max()) < tensor.format.levels
            check_law_1(tensor.format, params, f"{name} {method.name} {shape}")
            if shape == layout_shape or method.name == "rtn":
                check_layouts(tensor, f"{name} {shape}")
    shape = SHAPES[1 if format.best_fit and format.bits > 4 else -1]  # exact tables of many levels take long
    again = method(normal(*shape, seed=sum(shape)), format, facts_of(shape[1], rows=shape[0]))
    assert torch.equal(again.dequantize(), made[shape].dequantize())
    for one, other in zip(T.matrices(again), T.matrices(made[shape]), strict=True):
        assert torch.equal(one.packed, other.packed)
        assert all(torch.equal(one.params[key], other.params[key]) for key in other.params)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_weights_give_numbers(name: str) -> None:
    for kind, shape in itertools.product(HOSTILE, ((1, 1), (3, 70), (2, 300))):
        weight = HOSTILE[kind](*shape)
        format = formats.parse(name).bind(weight)
        params = F.fit(format, weight)
        assert all(bool(value.float().isfinite().all()) for value in params.values()), (kind, shape)
        codes = F.encode(format, weight, params)
        assert bool(F.decode(format, codes, params).isfinite().all()), (kind, shape)
        check_law_1(format, params, f"{name} {kind}")
        if kind == "zeros" and format.name.startswith(("nf4", "fp4", "pot", "mxfp4", "nvfp4", "ternary", "int")):
            smallest = 2.0**-14 if name.startswith("pot") else 2.0**-23
            assert float(F.decode(format, codes, params).abs().max()) <= smallest


def check_layouts(tensor: QTensor, context: str) -> None:
    codes, params = tensor.logical()
    values = tensor.dequantize()
    accepted = []
    for layout in layouts.LAYOUTS:
        reason = layout.refuse(tensor.format, tensor.shape)
        if reason is not None:
            assert isinstance(reason, str)
            assert tensor.format.name in reason or any(str(size) in reason for size in tensor.shape)
            continue
        accepted.append(layout)
        packed = tensor.repack(layout)
        check_same(packed, codes, params, f"{context} {layout.name}")
        assert torch.equal(packed.dequantize(), values)
        check_size(packed, layout)
    assert {"unpacked", "dense", "planes"} <= {layout.name for layout in accepted}
    walk = tensor
    for layout in itertools.chain(accepted, reversed(accepted)):
        walk = walk.repack(layout)
    check_same(walk, codes, params, f"{context} chain")


def check_same(tensor: QTensor, codes: torch.Tensor, params: dict[str, torch.Tensor], context: str) -> None:
    found, stored = tensor.logical()
    assert torch.equal(found, codes) and found.dtype == codes.dtype, context
    assert set(stored) == set(params), context
    for key, value in params.items():
        assert stored[key].dtype == value.dtype and stored[key].shape == value.shape, (context, key)
        assert torch.equal(stored[key], value), (context, key)


BITS_A_CODE: dict[str, Callable[[Format], float]] = {
    "dense": lambda format: format.bits,
    "planes": lambda format: format.bits,
    "pairs": lambda format: 4,
    "trits": lambda format: 1.6,
}


def check_size(packed: QTensor, layout: Layout) -> None:
    """Real bytes lie between the formula and the formula with every array's rows padded to whole bytes."""
    if layout.name not in BITS_A_CODE:
        return
    format = packed.format
    rows, columns = F.code_shape(format, packed.shape)
    blocks = B.count(columns, format.block)
    spans = B.count(columns, format.fit_block)
    groups = -(-rows // (format.group_rows or rows))
    chunks = -(-rows * blocks // (format.chunk or 1))
    entries = {
        "block": rows * blocks,
        "span": rows * spans,
        "chunk": chunks,
        "columns": blocks,
        "rows": groups,
        "tensor": 1,
    }
    numbers = [(p.bits, entries[p.per] * math.prod(p.entry)) for p in format.params]
    exact = rows * columns * BITS_A_CODE[layout.name](format) + sum(bits * count for bits, count in numbers)
    padded_rows = rows * (1 + len(format.params)) * format.bits
    assert exact <= 8 * packed.nbytes <= exact + 8 * padded_rows, (format.name, layout.name, packed.shape)
    assert all(array.flatten().view(torch.uint8).numel() for array in packed.params.values()), "a file writes bytes"
    assert packed.bits_per_weight == 8 * packed.nbytes / math.prod(packed.shape)


@pytest.mark.parametrize("name", SCALARS)
def test_decode_and_physical_against_float64(name: str) -> None:
    for shape in ((5, 33), (7, 97), (3, 300)):
        weight = normal(*shape, seed=shape[0])
        format = formats.parse(name).bind(weight)
        params = F.fit(format, weight)
        values = value_of(format, numpy_of(params))  # (rows, blocks, levels)
        bound = 4 * EPS * magnitude_of(format, numpy_of(params), values) + 2.0**-149
        every = torch.arange(format.levels, dtype=torch.uint8).expand(*values.shape)
        decoded = format.decode(every, params)
        assert decoded.dtype == torch.float32
        assert bool((np.abs(decoded.double().numpy() - values) <= bound).all())
        physical = format.physical(params)
        table = torch.arange(format.levels).float() if physical.table is None else physical.table
        assert table.shape[-1] == format.levels and physical.scale.shape == values.shape[:2]
        if table.ndim == 2:  # tables of rows
            assert table.shape[0] == shape[0] and format.group_rows > 0
            table = table[:, None]
        lowered = physical.scale.unsqueeze(-1) * table
        if physical.offset is not None:
            lowered = lowered + physical.offset.unsqueeze(-1)
        assert torch.equal(lowered, decoded), "a kernel's form must give the same float32"


@pytest.mark.parametrize("name", SCALARS)
def test_nearest_is_encode_and_decode_bit_for_bit(name: str) -> None:
    for kind, hostile in HOSTILE.items():
        weight = hostile(5, 97)
        format = formats.parse(name).bind(weight)
        blocks, params = B.split(weight, format.block), F.fit(format, weight)
        codes = format.encode(blocks, params)
        for given in (params, format.working(params)):
            got, values = format.nearest(blocks, given)
            assert torch.equal(got.to(torch.uint8), codes), kind
            assert torch.equal(values, format.decode(codes, params)), kind


@pytest.mark.parametrize("name", SCALARS)
def test_encode_is_the_nearest_by_brute_force(name: str) -> None:
    for shape in ((5, 33), (7, 97)):
        weight = normal(*shape, seed=shape[1])
        format = formats.parse(name).bind(weight)
        params = F.fit(format, weight)
        for factor in (1.0, 0.3, 1.7):  # inside the range and out of it
            blocks = B.split(weight * factor, format.block)
            values = value_of(format, numpy_of(params))
            distance = np.abs(blocks.double().numpy()[..., None] - values[:, :, None, :])
            codes = format.encode(blocks, params).numpy()[..., None].astype(np.int64)
            chosen = np.take_along_axis(distance, codes, -1)[..., 0]
            # the quotient by the scale is off by some EPS, so near a tie either neighbour may be chosen
            slack = 8 * EPS * (magnitude_of(format, numpy_of(params), values) + np.abs(blocks.double().numpy()))
            assert bool((chosen <= distance.min(-1) + slack).all())


def slow_fit(format: Format, block: np.ndarray) -> dict[str, float]:
    """The parameters of one block, float64, from the definitions; formats that fit blocks one by one, unrounded."""
    kind, _, rest = format.name.partition("/")
    largest, top = np.abs(block).max(), format.levels - 1
    if kind == "sign":
        return {"scale": np.abs(block).mean()}
    if kind == "int1" and rest.endswith("sym") and not rest.endswith("asym"):
        return {"scale": 2 * np.abs(block).mean()}
    if kind == "ternary":
        ordered = np.sort(np.abs(block))[::-1]
        gains = [ordered[: n + 1].sum() ** 2 / (n + 1) for n in range(len(ordered))]
        best = int(np.argmax(gains))
        return {"scale": ordered[: best + 1].mean()}
    if kind == "mxfp4":
        return {"exponent": math.floor(math.log2(largest)) - 2 + 127}
    if kind.startswith("int") and rest.endswith("asym"):
        low, high = min(block.min(), 0.0), max(block.max(), 0.0)
        return {"scale": (high - low) / top}
    if kind.startswith("int") and rest.endswith("min"):
        least = np.float64(np.float16(block.min()))
        return {"scale": max((block.max() - least) / top, abs(least) * 2.0**-14), "minimum": block.min()}
    if kind.startswith("int"):
        return {"scale": 2 * largest / top}
    if kind.startswith("palette"):
        return {"scale": largest} if format.scaled else {}  # tests/formats/test_palette.py tells of tables
    return {"scale": largest / max(TABLES[kind])}


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in SCALARS
        if n != "nvfp4" and not formats.parse(n).fit_block > formats.parse(n).block and formats.parse(n).plain is None
    ],
)
def test_fit_against_float64_block_by_block(name: str) -> None:
    rows, columns = 5, 97
    weight = normal(rows, columns, seed=9)
    format = formats.parse(name)
    params = F.fit(format, weight)
    size = B.width(columns, format.block)
    for row in range(rows):
        for block, start in enumerate(range(0, columns, size)):
            block_of = weight.flatten() if format.whole else weight[row, start : start + size]
            expected = slow_fit(format, block_of.double().numpy())
            for key, value in expected.items():
                found = float(params[key][row, block, 0])
                slack = abs(value) * (2.0**-11 + 2.0**-20) + (2.0**-14 if name.startswith("pot") else 2.0**-24)
                assert abs(found - value) <= slack, (key, row, block)
            if "zero_point" in params:
                low = min(float(block_of.min()), 0.0)
                zero = round(-low / float(params["scale"][row, block, 0]))
                assert abs(int(params["zero_point"][row, block, 0]) - zero) <= (zero > format.levels - 1)


def test_fits_do_not_depend_on_threads() -> None:
    weight = normal(1, 70000)
    before = torch.get_num_threads()
    try:
        for name in ("sign/channel", "ternary/channel", "int1/channel/sym", "int4/channel/asym", "nf4/channel"):
            format = formats.parse(name)
            torch.set_num_threads(1)
            one = F.fit(format, weight)
            torch.set_num_threads(4)
            many = F.fit(format, weight)
            assert all(torch.equal(one[key], many[key]) for key in one), name
    finally:
        torch.set_num_threads(before)
