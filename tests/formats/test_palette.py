# SPDX-License-Identifier: Apache-2.0
"""Palettes: what the fit minimises, how tables lie in a file, and which rows of the kernel table look them up."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit import formats, kernels, layouts, methods
from fewbit.core import format as F
from fewbit.core import scalars
from fewbit.core.facts import Facts
from fewbit.core.qtensor import QTensor, stack, storage
from fewbit.errors import SpecError, UnsupportedError
from fewbit.formats.palette import Palette, _distinct, _whole
from fewbit.kernels.row16 import chunk

NAMES = ("palette4", "palette3/rows16", "palette4/row", "palette2/rows3", "palette4/channel", "palette3/rows16/g32",
         "palette3/rows16/lut8", "palette2/row/lut8")  # fmt: skip
GOLDEN = Path(__file__).parent.parent / "golden" / "peers.npz"


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def palette(name: str) -> Palette:
    format = formats.parse(name)
    assert isinstance(format, Palette)
    return format


@cache
def rounded(name: str, rows: int, columns: int) -> QTensor:
    """One matrix a format for all kernels: exact tables of many levels take long."""
    return methods.rtn(normal(rows, columns), palette(name))


def lost(name: str, weight: torch.Tensor, worth: torch.Tensor, fitted: torch.Tensor | None) -> torch.Tensor:
    """Error weighted by ``worth``, float64 (groups,), of the fit weighted by ``fitted``."""
    format = palette(name)
    params = F.fit(format, weight, fitted)
    error = (F.decode(format, F.encode(format, weight, params), params) - weight).double().square() * worth
    each = format.group_rows or len(weight)
    return torch.nn.functional.pad(error.sum(1), (0, -len(weight) % each)).reshape(-1, each).sum(1)


@pytest.mark.parametrize("name", ["palette2", "palette3/rows16", "palette2/row", "palette1/rows3"])
def test_tables_are_exact_k_means_rounded_to_float16(name: str) -> None:
    weight, worth, format = normal(20, 40), normal(20, 40, seed=1).square(), palette(name)
    tables = F.fit(format, weight, worth)["table"]
    assert tables.shape == (20, 1, 1, format.levels)
    each = format.group_rows or 20
    for first in range(0, 20, each):
        rows = slice(first, first + each)
        centers = scalars.centers(weight[rows].reshape(1, -1), worth[rows].reshape(1, -1), format.levels)
        for row in tables[rows, 0, 0]:
            assert torch.equal(row, centers[0].half())


@pytest.mark.parametrize("name", NAMES)
def test_weighted_by_sensitivity_is_never_worse_in_its_own_objective(name: str) -> None:
    for seed in range(4):
        weight, worth = normal(35, 64, seed), normal(35, 64, seed + 9).abs() ** (4 * (seed + 1))
        weighted, plain = lost(name, weight, worth, worth), lost(name, weight, worth, None)
        # rounding to float16 moves a level by 2^-11 of itself, which costs that squared
        rounding = 2.0**-22 * (weight.double().square() * worth).sum()
        assert bool((weighted <= plain + rounding).all()) and float(weighted.sum()) < float(plain.sum())


@pytest.mark.parametrize("name", NAMES)
def test_clip_weighs_by_the_inputs_and_is_never_worse_than_rounding(name: str) -> None:
    weight = normal(35, 64)
    facts = Facts.of(normal(200, 64, 3) * torch.logspace(-2, 2, 64), gram=True)
    errors = {
        method: float(((methods.named(method)(weight, palette(name), facts).dequantize() - weight).double().square()
                       * facts.mean_square).sum())
        for method in ("rtn", "clip")
    }  # fmt: skip
    assert errors["clip"] < errors["rtn"]
    same = methods.clip(weight, palette(name))
    assert torch.equal(same.dequantize(), methods.rtn(weight, palette(name)).dequantize())


def test_the_centers_of_kmeans1d_and_the_entries_of_coremltools() -> None:
    with np.load(GOLDEN, allow_pickle=False) as data:
        saved = {key: torch.from_numpy(data[key]) for key in data.files if key.startswith(("kmeans", "lut"))}
    for count in (4, 8, 16):
        points = saved[f"kmeans{count}.points"].double()[None]
        centers = scalars.centers(points, torch.ones_like(points), count)
        torch.testing.assert_close(centers[0], saved[f"kmeans{count}.centers"], rtol=0, atol=1e-12)
    found = _whole(saved["kmeans16.centers"][None])
    theirs = saved["lut.entries"].double() / saved["lut.scale"].double()
    torch.testing.assert_close(found["table"][0].double(), theirs, rtol=0, atol=1e-4)
    assert float(found["table_scale"]) == pytest.approx(float(saved["lut.scale"]), rel=2**-11)


def test_entries_of_8_bits_against_the_nearest_numbers() -> None:
    """Half a step from the centers of least squares, which are those of float16 tables."""
    weight = normal(20, 40)
    for name in ("palette4", "palette3/rows16", "palette2/row"):
        exact = F.fit(palette(name), weight)["table"][:, 0, 0].double()
        params = F.fit(palette(f"{name}/lut8"), weight)
        scale = params["table_scale"][:, 0].double()
        assert bool(
            ((params["table"][:, 0, 0].double() * scale - exact).abs() <= 0.5 * scale + 2.0**-11 * exact.abs()).all()
        )
        assert bool((scale - exact.abs().amax(1, keepdim=True) / 127).abs().le(2.0**-10 * scale).all())


def test_entries_of_8_bits_are_all_different() -> None:
    for values in ([0.0] * 64, [-1.0] * 32 + [1.0] * 32, [1.0] * 63 + [1.001], [float(k < 3) for k in range(64)]):
        table = _whole(torch.tensor(sorted(values), dtype=torch.float64)[None])["table"][0].int()
        assert bool((table.diff() > 0).all()) and int(table.abs().max()) <= 127
    with pytest.raises(SpecError, match="all numbers of 8 bits"):
        formats.parse("palette8/lut8")


def test_rows_that_the_weights_do_not_serve_keep_the_plain_table() -> None:
    weight = torch.cat([normal(3, 64), torch.tensor([1000.0, 1000.5]).repeat(1, 32)])
    worth = torch.ones(64)
    worth[::2] = 1e-6
    facts = Facts(64, 1, worth.clone(), worth.clone(), None)
    plain = methods.rtn(weight, palette("palette1/row"))
    solved = methods.clip(weight, palette("palette1/row"), facts)
    for row in range(4):
        errors = [((q.dequantize()[row] - weight[row]).square() * worth).sum() for q in (solved, plain)]
        assert errors[0] <= errors[1]


def test_spare_levels_are_float16_of_their_own() -> None:
    for values in ([0.0, 0, 0, 0], [65504.0, 65504, 65504, 65504], [-65504.0, -65504, 65504, 65504], [1.0, 1, 2, 2]):
        table = _distinct(torch.tensor([values], dtype=torch.float64))[0]
        assert bool((table.float().diff() > 0).all()) and bool(table.isfinite().all())
        assert set(values) <= set(table.tolist())
    every = scalars.of_cells(torch.arange(100, 356, dtype=torch.int32)).double()
    assert torch.equal(_distinct(every[None])[0].double(), every)
    one = every[:1].expand(1, 256).clone()
    assert bool((_distinct(one).float().diff() > 0).all())


@pytest.mark.parametrize(("name", "tables", "scales"), [
    ("palette4", 1, 0), ("palette4/rows16", 3, 0), ("palette3/row", 37, 0), ("palette4/rows64", 1, 0),
    ("palette2/rows5/g32", 8, 3 * 37), ("palette8/channel", 1, 37),
    ("palette4/lut8", 1, 0), ("palette3/row/lut8", 37, 0), ("palette4/rows16/lut8/g32", 3, 3 * 37),
])  # fmt: skip
def test_true_bits_count_the_tables(name: str, tables: int, scales: int) -> None:
    format, dense, shape = palette(name), layouts.named("dense"), (37, 96)
    packed = methods.rtn(normal(*shape), format).repack(dense)
    table = 8 * format.levels + 16 if format.lut8 else 16 * format.levels
    assert 8 * packed.nbytes == format.bits * 37 * 96 + tables * table + 16 * scales
    sizes = {key: size for key, (_, size) in storage(format, dense, shape).items()}
    assert sizes == {"packed": tuple(packed.packed.shape)} | {k: tuple(v.shape) for k, v in packed.params.items()}


@pytest.mark.parametrize("name", [*NAMES, "palette6/rows32", "palette8"])
@pytest.mark.parametrize("isa", ["native", "serial", "reference"])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_kernels_multiply_by_what_is_decoded(name: str, isa: str, tokens: int) -> None:
    format, (rows, columns) = palette(name), (71, 97)
    alone = format.group_rows % 16 != 0
    serial = "row_lut_linear_serial" if alone else "lut_linear_serial"
    kernel = {"native": None, "serial": serial, "reference": "reference"}[isa]
    weight, x, bias = rounded(name, rows, columns), normal(tokens, columns, 1), normal(1, rows, 2)[0]
    if alone:
        with pytest.raises(UnsupportedError, match="one table in a tile of 16 rows"):
            kernels.prepare(weight, "lut_linear_serial")
    if alone and format.block % chunk(format.bits):
        with pytest.raises(UnsupportedError, match=f"whole chunks of {chunk(format.bits)} columns"):
            kernels.prepare(weight, serial)
        return
    prepared = kernels.prepare(weight.repack(layouts.named("dense")), kernel)
    assert (prepared.kernel == "reference") == (isa == "reference")
    values = weight.dequantize().double()
    expected = x.double() @ values.T + bias.double()
    bound = (columns + 64) * 2.0**-23 * (x.double().abs() @ values.abs().T + bias.abs())
    assert bool(((prepared(x, bias).double() - expected).abs() <= bound).all())
    decoded = torch.cat([strip.clone() for _, strip in prepared.decoded()])
    assert torch.equal(decoded, weight.dequantize())
    assert torch.equal(prepared.qtensor().dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", ["palette4", "palette3/rows16", "palette4/rows32/g32"])
def test_integers_multiply_the_tables_of_each_group(name: str) -> None:
    weight, x, activation = methods.rtn(normal(71, 96), palette(name)), normal(5, 96, 1), formats.parse("int8/g32")
    found = kernels.prepare(weight, "int8_lut_linear_serial", activation)(x)
    each, parts = palette(name).group_rows or 71, []
    codes, params = weight.logical()
    for first in range(0, 71, each):  # a matrix of one table each
        rows = slice(first, first + each)
        own = QTensor.of(weight.format, codes[rows], {key: value[rows] for key, value in params.items()})
        parts.append(kernels.prepare(own, "int8_lut_linear_serial", activation)(x))
    assert torch.equal(found, torch.cat(parts, 1))


def test_tiles_take_their_tables_along() -> None:
    weight = methods.rtn(normal(80, 64), palette("palette4/rows32"))
    prepared = kernels.prepare(weight, "lut_linear_serial")
    assert prepared.unit == 32  # type: ignore[attr-defined]
    part = prepared.tiles(2, 5)  # type: ignore[attr-defined]
    x = normal(2, 64, 1)
    assert torch.equal(part(x), prepared(x)[:, 32:80])
    assert torch.equal(part.qtensor().dequantize(), weight.dequantize()[32:80])


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_looked_up_in_every_layout(name: str) -> None:
    weight = methods.rtn(normal(40, 96), palette(name))
    ids = torch.tensor([[3, 39], [0, 17]])
    for layout in (layouts.UNPACKED, layouts.named("dense"), kernels.TILE16):
        assert torch.equal(kernels.embedding(ids, weight.repack(layout)), weight.dequantize()[ids])


def test_matrices_are_stacked_where_groups_end() -> None:
    parts = [methods.rtn(normal(32, 64, seed), palette("palette4/rows16")) for seed in (0, 1)]
    assert torch.equal(stack(parts).dequantize(), torch.cat([part.dequantize() for part in parts]))
    for name, rows in (("palette4/rows16", 40), ("palette4", 32)):
        with pytest.raises(UnsupportedError, match="share"):
            stack([methods.rtn(normal(rows, 64, seed), palette(name)) for seed in (0, 1)])


def test_activations_take_no_palette() -> None:
    with pytest.raises(UnsupportedError, match="fitted to every token"):
        kernels.choose(formats.parse("int4/g64"), (16, 64), activation=palette("palette4"))


def test_gptq_starts_from_the_weighted_palette_and_is_not_worse() -> None:
    weight, facts = normal(24, 64), Facts.of(normal(300, 64, 3) @ normal(64, 64, 4), gram=True)
    for name in ("palette3", "palette3/row", "palette3/rows16", "palette2/g32"):
        errors = [
            methods.relative_error(weight, methods.named(method)(weight, palette(name), facts), facts)
            for method in ("gptq", "clip")
        ]
        assert errors[0] < errors[1], name


def test_spellings() -> None:
    for name in (*NAMES, "palette6/rows128", "palette8/row/channel", "palette1/g64"):
        assert formats.parse(name).name == name
    for wrong in ("palette5", "palette4/rows0", "palette4/g64/row", "palette4/sym"):
        with pytest.raises(SpecError):
            formats.parse(wrong)


def test_a_table_is_looked_up_by_brute_force() -> None:
    format, weight = palette("palette3/rows16/g32"), normal(20, 70)
    params = F.fit(format, weight)
    codes = F.encode(format, weight * 1.3, params).numpy()
    for row in range(20):
        table = params["table"][row, 0, 0].double().numpy()
        for column in range(70):
            value = float(weight[row, column] * 1.3) / float(params["scale"][row, column // 32, 0])
            distance = np.abs(table - value)
            assert distance[codes[row, column]] <= distance.min() + 1e-6 * abs(value)
