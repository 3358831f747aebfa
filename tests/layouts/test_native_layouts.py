# SPDX-License-Identifier: Apache-2.0
"""Dense fields, nibble pairs, bit planes and base 3 against loops that place one bit or digit at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit import formats, layouts
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.layouts.dense import pack_rows, unpack_rows


def random_codes(rows: int, columns: int, levels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=generator, dtype=torch.uint8)


def quantized(name: str, rows: int, columns: int, seed: int = 0) -> QTensor:
    """Random codes under random parameters, every bit of them in use."""
    format = formats.parse(name)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-columns // (format.block or columns))
    repeat = max(1, format.fit_block // max(format.block, 1))
    params = {}
    for param in format.params:
        if param.dtype == torch.uint8:
            value = torch.randint(0, 2**param.bits, (rows, blocks, 1), generator=generator, dtype=torch.uint8)
        else:
            value = torch.randn(rows, blocks, 1, generator=generator).to(param.dtype)
        if param.per == "span":
            value = value[:, ::repeat].repeat_interleave(repeat, 1)[:, :blocks]
        if param.per == "tensor":
            value = value[:1, :1].expand(rows, blocks, 1)
        params[param.name] = value
    return QTensor.of(format, random_codes(rows, columns, format.levels, seed), params)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 33, 97])
def test_dense_bit_by_bit(bits: int, columns: int) -> None:
    codes = random_codes(3, columns, 2**bits)
    expected = torch.zeros(3, (columns * bits + 7) // 8, dtype=torch.int32)
    for row in range(3):
        for column in range(columns):
            for bit in range(bits):
                place = column * bits + bit
                expected[row, place // 8] |= (int(codes[row, column]) >> bit & 1) << place % 8
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.int(), expected)
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


def test_dense_three_bits_as_drawn() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    drawn = 0b000_111_110_101_100_011_010_001
    assert pack_rows(codes, 3).tolist() == [[drawn & 255, drawn >> 8 & 255, drawn >> 16]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**31))
def test_dense_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, 2**bits, seed)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


def test_pairs_low_nibble_first() -> None:
    tensor = quantized("int3/g4/sym", 1, 5).repack(layouts.named("pairs"))
    codes = tensor.logical()[0][0].tolist()
    assert tensor.packed.tolist() == [[codes[0] | codes[1] << 4, codes[2] | codes[3] << 4, codes[4]]]


def test_planes_bit_by_bit() -> None:
    tensor = quantized("int3/g8/sym", 2, 11)
    codes = tensor.logical()[0]
    packed = tensor.repack(layouts.named("planes")).packed
    assert packed.shape == (3, 2, 2)
    for bit in range(3):
        for row in range(2):
            for column in range(11):
                assert int(packed[bit, row, column // 8]) >> column % 8 & 1 == int(codes[row, column]) >> bit & 1


def test_trits_digit_by_digit() -> None:
    tensor = quantized("ternary/g8", 2, 13)
    codes = tensor.logical()[0]
    packed = tensor.repack(layouts.named("trits")).packed
    for row in range(2):
        for byte in range(3):
            digits = codes[row, 5 * byte : 5 * byte + 5].tolist()
            assert int(packed[row, byte]) == sum(digit * 3**place for place, digit in enumerate(digits))


def test_trits_of_all_bytes() -> None:
    layout, format = layouts.named("trits"), formats.parse("ternary/g5")
    packed = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    scale = {"scale": torch.ones(243, 1, dtype=torch.float16)}
    codes, params = layout.unpack(format, (243, 5), packed, scale)
    assert int(codes.max()) == 2
    assert torch.equal(layout.pack(format, (243, 5), codes, params)[0], packed)
    with pytest.raises(InputError, match="243"):
        layout.unpack(format, (1, 5), torch.tensor([[243]], dtype=torch.uint8), {"scale": scale["scale"][:1]})


@pytest.mark.parametrize(
    ("layout", "name", "shape", "bits"),
    [
        # codes, then parameters, in bits a row; rows of codes and of sub-byte parameters end on whole bytes
        ("dense", "int4/g128/sym", (4, 512), 4 + 16 / 128),
        ("dense", "int3/g64/asym", (4, 512), 3 + (16 + 3) / 64),
        ("dense", "int4/channel/asym", (4, 512), 4 + (16 + 8) / 512),
        ("dense", "int4/g32/min", (4, 512), 4 + 32 / 32),
        ("dense", "int4/g32x8/asym/s6", (4, 512), 4 + 12 / 32 + 32 / 256),
        ("q4_k", "int4/g32x8/asym/s6", (4, 512), 4.5),
        ("dense", "int6/g16x16/sym/s8", (4, 512), 6 + 8 / 16 + 16 / 256),
        ("q6_k", "int6/g16x16/sym/s8", (4, 512), 6.5625),
        ("dense", "nf4/g64", (4, 512), 4.25),
        ("dense", "pot3/g64", (4, 512), 3.25),
        ("dense", "mxfp4", (4, 512), 4.25),
        ("dense", "nvfp4", (4, 512), 4.5 + 32 / 2048),
        ("planes", "sign/g128", (4, 512), 1.125),
        ("dense", "ternary/g128", (4, 512), 2.125),
        ("trits", "ternary/g128", (4, 640), 1.6 + 16 / 128),
        ("trits", "sign/channel", (4, 640), 1.6 + 16 / 640),
        ("tq1_0", "ternary/g256", (4, 512), 1.6875),
        ("tq2_0", "ternary/g256", (4, 512), 2.0625),
        ("q8_0", "int8/g32/sym", (4, 512), 8.5),
        ("q4_0", "int4/g32/sym", (4, 512), 4.5),
        ("q4_1", "int4/g32/min", (4, 512), 5.0),
        ("gptq", "int4/g128/asym", (8, 512), 4 + (16 + 4) / 128 + 32 / 8),  # g_idx: 32 bits an input
        ("awq", "int4/g128/asym", (8, 512), 4 + (16 + 4) / 128),
        ("compressed-tensors", "int4/g128/asym", (8, 512), 4 + (16 + 4) / 128 + 128 / 4096),  # weight_shape
    ],
)
def test_true_bits(layout: str, name: str, shape: tuple[int, int], bits: float) -> None:
    tensor = quantized(name, *shape).repack(layouts.named(layout))
    assert tensor.bits_per_weight == bits
    assert tensor.nbytes * 8 == bits * shape[0] * shape[1]


def test_refusals_and_unknown_names() -> None:
    with pytest.raises(UnsupportedError, match="at most 4 bits"):
        quantized("int5/g8/sym", 2, 8).repack(layouts.named("pairs"))
    with pytest.raises(UnsupportedError, match="at most 3 levels"):
        quantized("int2/g8/sym", 2, 8).repack(layouts.named("trits"))
    with pytest.raises(SpecError, match="dense"):
        layouts.named("densest")


@pytest.mark.parametrize("layout", [row.name for row in layouts.LAYOUTS if row.name != "unpacked"])
def test_truncated_and_missing_arrays_are_named(layout: str) -> None:
    row = layouts.named(layout)
    names = (
        "int4/g32/asym",
        "int4/g32x8/asym/s6",
        "int6/g16x16/sym/s8",
        "int8/g32/sym",
        "ternary/g256",
        "int4/g32/min",
        "int4/g32/sym",
    )
    taken = 0
    for name in names:
        tensor = quantized(name, 64, 256)
        if row.refuse(tensor.format, tensor.shape) is not None:
            continue
        taken += 1
        packed, stored = row.pack(tensor.format, tensor.shape, *tensor.logical())
        with pytest.raises(InputError, match=r"found \("):
            row.unpack(tensor.format, tensor.shape, packed[:, :-1], stored)
        with pytest.raises(InputError, match=r"found \("):
            row.unpack(tensor.format, tensor.shape, packed[:-1], stored)
        for key in stored:
            if key in ("g_idx", "weight_shape"):  # implied by the format and the shape
                continue
            rest = {other: value for other, value in stored.items() if other != key}
            with pytest.raises(InputError, match=key):
                row.unpack(tensor.format, tensor.shape, packed, rest)
            with pytest.raises(InputError, match=key):
                row.unpack(tensor.format, tensor.shape, packed, {**stored, key: stored[key][:-1]})
    assert taken
