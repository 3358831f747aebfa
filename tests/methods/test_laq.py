# SPDX-License-Identifier: Apache-2.0
"""laq against the definition: statistics of blocks, and bits of tiles against every choice that there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit import formats, layouts, methods
from fewbit.core import format as F
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor, storage, storage_bytes
from fewbit.core.terms import Columns, Dense, Terms, matrices, repack
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods.laq import within
from oracle import laq_oracle as oracle

DENSE = layouts.named("dense")
GROUPS = ("int3/g8/asym", "int3/g8/sym", "int2/g8/min", "int4/g4x2/asym/s6")
WIDTHS = (2, 3, 4, 8)
LAQ = methods.named("laq")


def case(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Facts]:
    """A weight and inputs whose columns differ by orders of magnitude, in runs of some columns."""
    generator = torch.Generator().manual_seed(seed)

    def sizes() -> Tensor:
        return (1.5 * torch.randn(-(-columns // 6), generator=generator)).exp().repeat_interleave(6)[:columns]

    weight = torch.randn(rows, columns, generator=generator) * sizes()
    return weight, Facts.of(torch.randn(50, columns, generator=generator) * sizes())


def planned(format: Format, shape: tuple[int, int], **options: Any) -> int:
    """Bytes, by the matrices that the method says it will make."""
    made = LAQ.made_of(format, shape, options)
    return made.beside + sum(storage_bytes(storage(part, DENSE, size)) for part, size in made.matrices)


def with_bits(format: Format, bits: int) -> Format:
    _, _, rest = format.name.partition("/")
    return formats.parse(f"int{bits}/{rest}")


def alone(weight: Tensor, format: Format, facts: Facts, bits: int) -> QTensor:
    made = methods.laq(weight, with_bits(format, bits), facts)
    assert isinstance(made, QTensor)
    return made


def widths_of(result: Terms, size: int) -> tuple[int, ...]:
    """The width of each tile, from what is stored."""
    (columns,) = result.terms
    assert isinstance(columns, Columns)
    order, first = columns.permutation.long(), 0
    found: dict[int, set[int]] = {}
    for part in columns.parts:
        assert isinstance(part, Dense)
        for column in order[first : first + part.shape[1]].tolist():
            found.setdefault(column // size, set()).add(part.qtensor.format.bits)
        first += part.shape[1]
    assert all(len(bits) == 1 for bits in found.values())
    return tuple(found[tile].pop() for tile in sorted(found))


def errors_of(weight: Tensor, format: Format, facts: Facts, widths: tuple[int, ...]) -> dict[int, oracle.Array]:
    """Of tiles of 8 columns, by the width."""
    square = facts.mean_square.double().numpy()
    values = {bits: alone(weight, format, facts, bits).dequantize().double().numpy() for bits in widths}
    return {bits: oracle.weighted(weight.double().numpy(), each, square, 8) for bits, each in values.items()}


def solved(weight: Tensor, format: Format, facts: Facts, bits: float, **options: Any) -> Terms:
    """Packed; its bytes are those that were planned, and in the budget."""
    made = methods.laq(weight, format, facts, mean_bits=bits, **options)
    assert isinstance(made, Terms)
    packed = repack(made, lambda format: DENSE)
    assert isinstance(packed, Terms)
    assert packed.nbytes == planned(format, (weight.shape[0], weight.shape[1]), mean_bits=bits, **options)
    assert 8 * packed.nbytes <= bits * weight.numel() + 1e-6
    return packed


@pytest.mark.parametrize("columns", [48, 45])
@pytest.mark.parametrize("name", GROUPS)
def test_no_choice_of_the_same_bytes_loses_less(name: str, columns: int) -> None:
    format, shape = formats.parse(name), (9, columns)
    weight, facts = case(*shape, seed=columns)
    errors = errors_of(weight, format, facts, WIDTHS)
    params = {
        bits: [(each.fit_block if p.per == "span" else each.block, p.bits) for p in each.params]
        for bits, each in ((bits, with_bits(format, bits)) for bits in WIDTHS)
    }
    every = {c: oracle.stored(c, shape, 8, params) for c in oracle.choices(WIDTHS, len(errors[2]))}
    kinds = set()
    for share in (0.1, 0.25, 0.4, 0.6, 0.8):
        size = min(every.values()) * (1 - share) + max(every.values()) * share
        result = solved(weight, format, facts, 8 * size / weight.numel())
        found = widths_of(result, 8)
        assert result.nbytes == every[found]
        alike = [c for c, size in every.items() if size == every[found] and (columns == 48 or c[-1] == found[-1])]
        assert found == min(alike, key=lambda c: oracle.cost(c, errors))
        kinds.add(len(set(found)))
        for side in matrices(result):  # nothing was fitted again
            assert side.format == with_bits(format, side.format.bits)
        whole = {b: alone(weight, format, facts, b).dequantize() for b in WIDTHS}
        expected = torch.cat([whole[b][:, 8 * t : 8 * t + 8] for t, b in enumerate(found)], 1)
        assert torch.equal(result.dequantize(), expected)
    assert max(kinds) >= 3


@pytest.mark.parametrize("seed", range(4))
def test_where_a_lambda_leads_to_the_bytes_its_choice_is_taken(seed: int) -> None:
    """With scales alone a tile takes bits that nothing but its width decides, as the rule of lambda has it."""
    format, shape = formats.parse("int3/g8/sym"), (7, 48)
    weight, facts = case(*shape, seed=seed)
    errors = errors_of(weight, format, facts, WIDTHS[:3])
    seen = set()
    for price in oracle.prices(errors):
        choice = oracle.by_lambda(errors, price)
        size = oracle.stored(choice, shape, 8, {bits: [(8, 16)] for bits in WIDTHS})
        no_more = [c for c in oracle.choices(WIDTHS[:3], 6) if sum(c) <= sum(choice)]
        assert choice == min(no_more, key=lambda c: oracle.cost(c, errors))
        assert widths_of(solved(weight, format, facts, 8 * size / weight.numel(), widths="2,3,4"), 8) == choice
        seen.add(choice)
    assert len(seen) > 6


@pytest.mark.parametrize("name", GROUPS)
def test_many_tiles_lose_less_than_one_width_of_the_same_bits(name: str) -> None:
    format, shape = with_bits(formats.parse(name), 3), (5, 8 * 70)
    weight, facts = case(*shape)
    plain = methods.clip(weight, format, facts).repack(DENSE)
    result = solved(weight, format, facts, plain.bits_per_weight + 16 / shape[0])
    assert result.nbytes == plain.nbytes + 2 * shape[1]
    lost = [((weight - each.dequantize()).double().square() * facts.mean_square).sum() for each in (result, plain)]
    assert lost[0] < 0.3 * lost[1]
    wider = solved(weight, format, facts, result.bits_per_weight, tile=3)
    assert len(set(widths_of(wider, 3 * max(format.block, format.fit_block)))) > 1


def test_the_same_at_any_number_of_threads() -> None:
    weight, facts = case(300, 256)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(solved(weight, formats.parse("int3/g32/asym"), facts, 3.3))
    first, second = results
    assert isinstance(first.terms[0], Columns) and isinstance(second.terms[0], Columns)
    assert torch.equal(first.terms[0].permutation, second.terms[0].permutation)
    for one, other in zip(matrices(first), matrices(second), strict=True):
        assert torch.equal(one.packed, other.packed)
        assert all(torch.equal(one.params[key], other.params[key]) for key in one.params)


@pytest.mark.parametrize("name", ["int3/g8/asym", "int4/channel/sym", "nf4/g8", "palette3/row"])
@pytest.mark.parametrize("percentile", [99.0, 80.0])
def test_statistics(name: str, percentile: float) -> None:
    format = formats.parse(name)
    weight, facts = case(6, 45)
    for statistic, other in (("absmax", methods.rtn(weight, format)), ("mse", methods.clip(weight, format, facts))):
        made = methods.laq(weight, format, facts, statistic=statistic)
        assert isinstance(made, QTensor) and torch.equal(made.dequantize(), other.dequantize())
    size = format.block or 45
    cut = np.stack(
        [
            np.concatenate([oracle.cut(row[i : i + size], percentile) for i in range(0, 45, size)])
            for row in weight.double().numpy()
        ]
    )
    assert np.array_equal(within(weight, format.block, percentile).numpy(), cut.astype(np.float32))
    made = methods.laq(weight, format, statistic="percentile", percentile=percentile)
    params = F.fit(format, torch.from_numpy(cut).float())
    assert isinstance(made, QTensor)
    assert torch.equal(made.dequantize(), QTensor.nearest(format, weight, params).dequantize())


def test_what_is_out_of_range_is_refused_with_what_works() -> None:
    weight, facts = case(8, 64)
    format = formats.parse("int3/g8/asym")
    for options, match in (
        ({"statistic": "median"}, "absmax, percentile, mse"),
        ({"percentile": 50.0}, "above 50"),
        ({"mean_bits": -1.0}, "no number of bits"),
        ({"mean_bits": float("nan")}, "no number of bits"),
        ({"mean_bits": 4.0}, r"mean_bits=6\.25 or more"),
        ({"mean_bits": 7.0, "tile": 0}, "no number of blocks"),
        ({"mean_bits": 7.0, "widths": "2,2"}, "different numbers"),
        ({"mean_bits": 7.0, "widths": "2,3,4,5,8"}, "different numbers"),
        ({"mean_bits": 7.0, "widths": "two"}, "different numbers"),
        ({"mean_bits": 7.0, "widths": "1,4"}, "from 2 to 8"),
    ):
        with pytest.raises(SpecError, match=match):
            methods.laq(weight, format, facts, **options)
        with pytest.raises(SpecError, match=match):
            LAQ.made_of(format, (8, 64), options)
    for name in ("nf4/g8", "int3/channel/asym", "nvfp4"):
        with pytest.raises(UnsupportedError, match="blocks of integers"):
            methods.laq(weight, formats.parse(name), facts, mean_bits=5.0)
    with pytest.raises(UnsupportedError, match="4 weights"):
        methods.laq(weight, formats.parse("vector4x4"), facts)
    assert planned(format, (8, 64), mean_bits=6.25) == 8 * 64 * 6.25 / 8
