# SPDX-License-Identifier: Apache-2.0
"""Scales coded in 8 bits (double quantization): against its definition, bitsandbytes, and what kernels read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit import formats, kernels, layouts, methods
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor, storage, storage_bytes
from fewbit.errors import UnsupportedError
from fewbit.formats.dynamic import DYNAMIC, code_scales
from fewbit.formats.table import TABLES

GOLDEN = Path(__file__).parent.parent / "golden" / "peers.npz"

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def golden(kind: str = "nf4") -> dict[str, torch.Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as data:
        return {key[4:]: torch.from_numpy(data[key]) for key in data.files if key.startswith(f"{kind}.")}


def test_the_map_is_that_of_its_paper_and_of_bitsandbytes() -> None:
    """7 bits but the sign: zeros (a power of ten each), a one, and what is left is a fraction between 0.1 and 1."""
    values = {0.0, 1.0}
    for zeros in range(7):
        fraction = 6 - zeros
        for k in range(2**fraction):
            value = 10.0**-zeros * (0.1 + 0.9 * (k + 0.5) / 2**fraction)
            values |= {value, -value}
    assert len(DYNAMIC) == 256
    np.testing.assert_allclose(DYNAMIC, sorted(values), rtol=1e-12)
    np.testing.assert_allclose(DYNAMIC, golden()["map"].double().numpy(), rtol=2.0**-22)


@pytest.mark.parametrize(("kind", "family"), [("nf4", "nf4"), ("fp4", "fp4bnb")])
def test_what_bitsandbytes_stores(kind: str, family: str) -> None:
    """The same codes, of which FP4 has two for zero, but in the middle between two values; and the same scales,
    coded."""
    saved = golden(kind)
    weight, table = saved["weight"].float(), torch.tensor(TABLES[family])
    blocks = weight.reshape(36, 8, 64)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (saved["table"][saved["codes"].int()].unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)
    assert np.allclose(saved["table"].unique().numpy(), TABLES[family], rtol=2**-23, atol=0)
    other = formats.parse(f"{family}/g64").encode(blocks, {"scale": largest}).reshape(36, 512) != codes
    middles = (table[1:] + table[:-1]) / 2
    tied = ((blocks / largest).reshape(36, 512, 1) - middles).abs().amin(-1) <= 2.0**-23
    assert int(other.sum()) <= 1 and not bool((other & ~tied).any())
    found = code_scales(largest)
    assert torch.equal(found["scale_code"].squeeze(-1), saved["scale_code"])
    assert found["super_scale"].unique_consecutive().numpy() == pytest.approx(saved["super_scale"].numpy(), rel=2**-22)
    assert float(found["scale_mean"][0, 0, 0]) == pytest.approx(float(saved["scale_mean"]), rel=2**-22)
    own = QTensor.of(formats.parse(f"{family}/g64/dq"), codes, found).dequantize()
    # a scale far below the mean is a difference of float32, each rounded to 2^-24 of itself
    assert bool(((own - saved["values"]).abs() <= 2.0**-22 * largest.max()).all())
    assert float((own - weight).square().mean()) < 1.01 * float((saved["values"] - weight).square().mean())


def slow(name: str, weight: np.ndarray) -> np.ndarray:
    """float64, one block after the other."""
    family, group, _ = name.split("/")
    table, size = np.array(TABLES[family]), int(group[1:])
    blocks = [row[first : first + size] for row in weight for first in range(0, len(row), size)]
    scales = np.array([np.abs(block).max() / table.max() for block in blocks])
    mean, values = scales.mean(), []
    for first in range(0, len(scales), 256):
        apart = scales[first : first + 256] - mean
        unit = np.abs(apart).max()
        values += [mean + unit * DYNAMIC[int(np.abs(np.array(DYNAMIC) - one / unit).argmin())] for one in apart]
    near = [scale * table[np.abs(block[:, None] / scale - table).argmin(1)]
            for block, scale in zip(blocks, values, strict=True)]  # fmt: skip
    return np.concatenate(near).reshape(weight.shape)


@pytest.mark.parametrize("name", ["nf4/g8/dq", "fp4/g16/dq", "pot3/g8/dq"])
def test_rounding_against_its_definition(name: str) -> None:
    """37 rows of 13 (or 7) blocks: chunks begin and end within rows; the last block of a row is short."""
    weight = normal(37, 100) * torch.logspace(-1, 1, 37)[:, None]
    found = methods.rtn(weight, formats.parse(name)).dequantize().double().numpy()
    expected = slow(name, weight.double().numpy())
    # float32 rounds mean and differences, 2^-22 of the largest scale; near a tie that makes a neighbour of a level
    off = np.abs(found - expected) > 2.0**-19 * np.abs(weight.numpy()).max()
    assert off.mean() < 1e-3


def test_true_bits() -> None:
    format, dense = formats.parse("nf4/g64/dq"), layouts.named("dense")
    sizes = storage(format, dense, (4096, 4096))
    assert 8 * storage_bytes(sizes) / 4096**2 == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2
    packed = methods.rtn(normal(37, 288), format).repack(dense)
    assert {name: tuple(array.shape) for name, array in packed.params.items()} == {
        "scale_code": (37, 5), "super_scale": (1, 1), "scale_mean": (1, 1)}  # fmt: skip
    assert {name: shape for name, (_, shape) in storage(format, dense, (61, 288)).items()}["super_scale"] == (1, 2)


def test_no_scale_is_lost_below_the_mean() -> None:
    weight = normal(300, 64) * 1e-4
    weight[0] *= 1e8
    q = methods.rtn(weight, formats.parse("nf4/g64/dq"))
    physical = q.format.physical(q.logical()[1])
    assert float(physical.scale.min()) > 0  # type: ignore[union-attr]
    assert bool(q.dequantize().isfinite().all())


def test_searches_go_block_by_block_and_are_never_worse() -> None:
    weight, format = normal(40, 96), formats.parse("nf4/g32/dq")
    facts = Facts.of(normal(200, 96, 3) * torch.logspace(-1, 1, 96), gram=True)
    errors = {
        name: float((((methods.named(name)(weight, on, facts).dequantize() - weight) ** 2).double()
                     * facts.mean_square).sum())
        for name, on in (("rtn", format), ("clip", format))
    }  # fmt: skip
    coarse = float((((methods.clip(weight, formats.parse("nf4/g32"), facts).dequantize() - weight) ** 2).double()
                    * facts.mean_square).sum())  # fmt: skip
    assert errors["clip"] < 0.9 * errors["rtn"]
    assert errors["clip"] < 1.02 * coarse
    lost = [
        methods.relative_error(weight, methods.named(name)(weight, format, facts), facts) for name in ("clip", "gptq")
    ]
    assert lost[1] < lost[0]


@pytest.mark.parametrize("kernel", [None, "lut_linear_serial", "reference"])
def test_kernels_multiply_by_what_is_decoded(kernel: str | None) -> None:
    weight, x = methods.rtn(normal(71, 96), formats.parse("nf4/g32/dq")), normal(3, 96, 1)
    prepared = kernels.prepare(weight.repack(layouts.named("dense")), kernel)
    values = weight.dequantize().double()
    bound = 160 * 2.0**-23 * (x.double().abs() @ values.abs().T)
    assert bool(((prepared(x).double() - x.double() @ values.T).abs() <= bound).all())
    assert torch.equal(prepared.weight().dequantize(), weight.dequantize())


def test_tiles_and_rows_take_their_scales_along() -> None:
    """32 rows of 8 blocks share a super scale."""
    weight = methods.rtn(normal(80, 64) * torch.logspace(0, 2, 80)[:, None], formats.parse("fp4/g8/dq"))
    prepared = kernels.prepare(weight, "lut_linear_serial")
    assert prepared.unit == 32  # type: ignore[attr-defined]
    part = prepared.tiles(2, 5)  # type: ignore[attr-defined]
    assert torch.equal(part.qtensor().dequantize(), weight.dequantize()[32:80])
    assert torch.equal(part(normal(2, 64, 1)), prepared(normal(2, 64, 1))[:, 32:80])
    ids = torch.tensor([[79, 3], [40, 40]])
    for layout in ("dense", "unpacked"):
        found = kernels.embedding(ids, weight.repack(layouts.named(layout)))
        assert torch.equal(found, weight.dequantize()[ids])


def test_no_format_of_activations() -> None:
    with pytest.raises(UnsupportedError, match="fitted to every token"):
        kernels.choose(formats.parse("int4/g32"), (16, 64), activation=formats.parse("nf4/g64/dq"))
