# SPDX-License-Identifier: Apache-2.0
"""The int32 layouts against slow loops over words, and what of their files is refused."""

from __future__ import annotations

import pytest
import torch

from fewbit import formats, layouts
from fewbit.core.qtensor import QTensor
from fewbit.errors import InputError
from fewbit.formats.affine import Affine

MASK = 2**32 - 1


def quantized(name: str, rows: int, columns: int, seed: int = 0) -> QTensor:
    format = formats.parse(name)
    assert isinstance(format, Affine)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-columns // (format.block or columns))
    params = {"scale": torch.randn(rows, blocks, 1, generator=generator).half()}
    codes = torch.randint(0, format.levels, (rows, columns), generator=generator, dtype=torch.uint8)
    if not format.symmetric:
        zero = torch.randint(0, format.levels, (rows, blocks, 1), generator=generator, dtype=torch.uint8)
        zero[0, 0] = 0
        params["zero_point"] = zero
    return QTensor.of(format, codes, params)


def words_along(values: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of a little-endian bit stream, built as one big integer."""
    stream = sum(value << bits * place for place, value in enumerate(values))
    words = [stream >> 32 * word & MASK for word in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize(
    "name", ["int2/g16/asym", "int3/g32/asym", "int4/g16/sym", "int8/g32/asym", "int4/channel/asym"]
)
@pytest.mark.parametrize(("layout", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_word_by_word(name: str, layout: str, less: int) -> None:
    tensor = quantized(name, 32, 64)
    format = tensor.format
    codes, params = tensor.logical()
    packed = tensor.repack(layouts.named(layout))
    assert packed.packed.shape == (64 * format.bits // 32, 32) and packed.packed.dtype == torch.int32
    for row in range(32):
        assert packed.packed[:, row].tolist() == words_along(codes[row].tolist(), format.bits)
    zero = params.get("zero_point", torch.full_like(params["scale"], format.levels // 2)).int().squeeze(-1)
    for group in range(zero.shape[1]):
        stored = [(z - less) % format.levels for z in zero[:, group].tolist()]
        assert packed.params["qzeros"][group].tolist() == words_along(stored, format.bits)
        assert torch.equal(packed.params["scales"][group], params["scale"][:, group, 0])
    size = format.block or 64
    assert packed.params["g_idx"].tolist() == [column // size for column in range(64)]


def test_gptq_three_bits_straddle_as_documented() -> None:
    """10 codes, then code 10 across words 0 and 1, 10 codes, then code 21 across words 1 and 2, 10 codes."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).repeat(32, 1)
    tensor = QTensor.of(formats.parse("int3/g32/sym"), codes, {"scale": torch.ones(32, 1, 1).half()})
    first, second, third = (int(word) & MASK for word in tensor.repack(layouts.named("gptq")).packed[:, 0])
    q = codes[0].tolist()
    assert first == sum(q[i] << 3 * i for i in range(10)) | (q[10] & 3) << 30
    assert second == q[10] >> 2 | sum(q[i] << 1 + 3 * (i - 11) for i in range(11, 21)) | (q[21] & 1) << 31
    assert third == q[21] >> 1 | sum(q[i] << 2 + 3 * (i - 22) for i in range(22, 32))


def test_awq_nibble_by_nibble() -> None:
    tensor = quantized("int4/g16/asym", 16, 48)
    codes, params = tensor.logical()
    packed = tensor.repack(layouts.named("awq"))
    assert packed.packed.shape == (48, 2)
    for column in range(48):
        for word in range(2):
            for lane, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                nibble = int(packed.packed[column, word]) >> 4 * lane & 15
                assert nibble == int(codes[8 * word + output, column])
                zero = int(packed.params["qzeros"][column // 16, word]) >> 4 * lane & 15
                assert zero == int(params["zero_point"][8 * word + output, column // 16, 0])


def test_gptq_dequantizes_as_its_readers_do() -> None:
    """scales[g] * (code - (stored zero + 1)), computed from the file's arrays alone."""
    tensor = quantized("int4/g16/asym", 32, 64)
    tensor.params["zero_point"].clamp_(min=1)  # v1 readers without a modulo cannot see a zero of 0
    file = tensor.repack(layouts.named("gptq"))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (file.packed.unsqueeze(1) >> shifts[:, None] & 15).reshape(64, 32)
    zeros = (file.params["qzeros"].unsqueeze(-1) >> shifts & 15).reshape(4, 32) + 1
    group = file.params["g_idx"].long()
    weight = file.params["scales"][group].float() * (codes - zeros[group]).float()
    assert torch.equal(weight.T, tensor.dequantize())


def test_gptq_refuses_reordered_groups_and_accepts_none() -> None:
    tensor = quantized("int4/g32/asym", 32, 64).repack(layouts.named("gptq"))
    row = layouts.named("gptq")
    stored = dict(tensor.params)
    stored["g_idx"] = stored["g_idx"].flip(0)
    with pytest.raises(InputError, match="another order"):
        row.unpack(tensor.format, tensor.shape, tensor.packed, stored)
    del stored["g_idx"]
    assert torch.equal(row.unpack(tensor.format, tensor.shape, tensor.packed, stored)[0], tensor.logical()[0])


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_symmetric_reading_of_asymmetric_zeros_is_refused(layout: str) -> None:
    row = layouts.named(layout)
    tensor = quantized("int4/g32/asym", 32, 64).repack(row)
    with pytest.raises(InputError, match="asym"):
        row.unpack(formats.parse("int4/g32/sym"), tensor.shape, tensor.packed, tensor.params)


def test_bfloat16_scales_are_kept_or_refused() -> None:
    row = layouts.named("compressed-tensors")
    tensor = quantized("int4/g32/sym", 4, 64).repack(row)
    exact = torch.full((4, 2), 2.0**-10 * 1.5, dtype=torch.bfloat16)
    _, params = row.unpack(tensor.format, tensor.shape, tensor.packed, {**tensor.params, "weight_scale": exact})
    assert torch.equal(params["scale"].squeeze(-1).float(), exact.float())
    for value in (2.0**-20 * 1.0078125, 1e6):
        bad = {**tensor.params, "weight_scale": torch.full((4, 2), value, dtype=torch.bfloat16)}
        with pytest.raises(InputError, match="float16 cannot hold"):
            row.unpack(tensor.format, tensor.shape, tensor.packed, bad)


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        ("gptq", "int5/g32/sym", (32, 64)),
        ("gptq", "int3/g32/sym", (30, 64)),
        ("gptq", "int3/g32/sym", (32, 40)),
        ("gptq", "nf4/g64", (32, 64)),
        ("awq", "int3/g32/sym", (32, 64)),
        ("awq", "int4/g32/sym", (12, 64)),
        ("compressed-tensors", "int1/g32/sym", (32, 64)),
        ("compressed-tensors", "int4/g32/min", (32, 64)),
        ("q4_0", "int4/g64/sym", (32, 64)),
        ("q4_0", "int4/g32/sym", (32, 80)),
        ("q4_k", "int4/g32x8/asym/s6", (32, 128)),
        ("tq1_0", "ternary/g128", (32, 256)),
    ],
)
def test_refusals_say_why(layout: str, name: str, shape: tuple[int, int]) -> None:
    reason = layouts.named(layout).refuse(formats.parse(name), shape)
    assert reason and len(reason.split()) > 4
