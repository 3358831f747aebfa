# SPDX-License-Identifier: Apache-2.0
"""The laws over the table of transforms, on plain tensors, small odd shapes included.

5. What is stored is what the kind of rewrite says, byte for byte, and is enough to run it.
6. A rewrite alone changes no output: ``apply(x) @ weight(W).T == x @ W.T``. (On whole models: tests/model.)
7. Same input, same seed: the same bytes.

And: facts of rewritten inputs are the rewritten facts of the inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fewbit import formats, transforms
from fewbit.core import rewrite as R
from fewbit.core.facts import Facts
from fewbit.core.transform import Transform, seed_of
from fewbit.errors import InputError

EPS, EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
COLUMNS = (1, 2, 6, 24, 33, 64, 96, 128, 320, 8192)
CHAINS = [(row,) for row in transforms.TRANSFORMS] + [
    chain
    for chain in itertools.permutations(transforms.TRANSFORMS, 2)
    if not (chain[0].mixes and chain[1].needs != "nothing")
]
MOST_GRAM = 320
TOKENS, ROWS = 40, 5
FORMAT = formats.parse("int4/g32/asym")


@pytest.fixture(params=CHAINS, ids=lambda chain: "+".join(row.name for row in chain))
def rows(request: pytest.FixtureRequest) -> tuple[Transform, ...]:
    chosen: tuple[Transform, ...] = request.param
    return chosen


def sample(columns: int) -> tuple[Tensor, Tensor]:
    """Inputs (tokens, columns) with channels of very different sizes, one of them dead, and a weight; float64."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(TOKENS, columns, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-2, 2, columns, dtype=torch.float64)
    if columns > 2:
        x[:, 1] = 0
    # float32 values, so that facts see the same numbers
    return x.float().double(), torch.randn(ROWS, columns, generator=generator, dtype=torch.float64).float().double()


def fitted(rows: tuple[Transform, ...], x: Tensor, weight: Tensor, seed: int = 11) -> R.Chain | None:
    """As a run does it; None where the table says that a row refuses, or takes E[x x^T] of very wide inputs."""
    if any(row.refuse(x.shape[1]) is not None for row in rows) or (grams(rows) and x.shape[1] > MOST_GRAM):
        return None
    steps = []
    for row in rows:
        before = R.Chain(tuple(steps))
        facts = Facts.of(before.apply(x), gram=row.needs == "gram")
        steps.append(row(before.weight(weight).float(), facts, seed, FORMAT))
        assert steps[-1].kind == row.makes
    return R.Chain(tuple(steps))


def grams(rows: tuple[Transform, ...]) -> bool:
    return any(row.needs == "gram" for row in rows)


def widths(rows: tuple[Transform, ...], columns: Sequence[int]) -> Sequence[int]:
    """Every width for a transform alone, every other one for a chain of two, the others for the next chain."""
    return columns if len(rows) == 1 else columns[CHAINS.index(rows) % 2 :: 2]


def length(values: Tensor) -> Tensor:
    return values.norm(dim=-1, keepdim=True)


def test_laws_5_6_and_7(rows: tuple[Transform, ...]) -> None:
    for columns in widths(rows, COLUMNS):
        x, weight = sample(columns)
        chain = fitted(rows, x, weight)
        if chain is not None:
            check_law_6(chain, x, weight)
            check_laws_5_and_7(rows, chain, x, weight)


def check_law_6(chain: R.Chain, x: Tensor, weight: Tensor) -> None:
    """A rewrite alone changes nothing."""
    columns = x.shape[1]
    # Each rewritten entry is off by at most c eps times the length of what was mixed; a product adds `columns`
    # roundings. The lengths are those after scaling, which a rotation keeps.
    c = 4 * (columns + 64 * columns**0.5)
    rewritten, moved = chain.apply(x), chain.weight(weight)
    bound = c * EPS * (length(rewritten) @ length(moved).T) + 1e-300
    assert ((rewritten @ moved.T - x @ weight.T).abs() <= bound).all()
    for there, back, values in ((chain.apply, chain.inverse, x), (chain.weight, chain.unweight, weight)):
        once = there(values)  # where the bound is simple: a way back may enlarge one channel's error
        assert ((there(back(once)) - once).abs() <= 3 * c * EPS * length(once) + 1e-300).all()
    # what stands for a weight on rewritten inputs is its unweighted form on the original ones
    codes = torch.randn(ROWS, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    effective = chain.unweight(codes)
    bound = c * EPS * (length(rewritten) @ length(codes).T)
    assert ((rewritten @ codes.T - x @ effective.T).abs() <= bound + 1e-300).all()


def check_laws_5_and_7(rows: tuple[Transform, ...], chain: R.Chain, x: Tensor, weight: Tensor) -> None:
    """Stored bytes."""
    columns = x.shape[1]
    again = fitted(rows, x.clone(), weight.clone())
    assert again is not None
    sizes = R.storage([row.makes for row in rows], columns)
    assert {name: (array.dtype, tuple(array.shape)) for name, array in chain.arrays.items()} == sizes
    assert chain.nbytes == sum(len(array.numpy().tobytes()) for array in chain.arrays.values())
    assert all(torch.equal(array, again.arrays[name]) for name, array in chain.arrays.items())
    restored = R.restore(chain.kinds, columns, {name: array.clone() for name, array in chain.arrays.items()})
    assert torch.equal(restored.apply(x), chain.apply(x)) and torch.equal(restored.weight(weight), chain.weight(weight))


def test_facts_are_rewritten_as_inputs_are(rows: tuple[Transform, ...]) -> None:
    for columns in widths(rows, [c for c in COLUMNS if c <= MOST_GRAM]):
        x, weight = sample(columns)
        chain = fitted(rows, x, weight)
        if chain is not None:
            check_facts(rows, chain, x)


def check_facts(rows: tuple[Transform, ...], chain: R.Chain, x: Tensor) -> None:
    columns = x.shape[1]
    found = chain.facts(Facts.of(x, gram=True))
    exact = chain.apply(x)
    # |A_1| |A_2|: entry i of an input reaches entry j times this at most. Sums over tokens and over 64 columns are
    # rounded.
    reach = torch.eye(columns, dtype=torch.float64)
    for step in chain.steps:
        reach = reach @ step.apply(torch.eye(columns, dtype=torch.float64)).abs()
    relative = (TOKENS + 300) * EPS32
    total = relative * (x.abs().sum(0) @ reach)
    gram = relative * (reach.T @ (x.abs().T @ x.abs()) @ reach)
    assert found.tokens == TOKENS and found.columns == columns
    assert ((found.total - exact.sum(0)).abs() <= total + 1e-30).all()
    assert found.gram is not None and torch.equal(found.gram, found.gram.T)
    assert ((found.gram - exact.T @ exact).abs() <= gram + 1e-30).all()
    assert ((found.total_square - exact.square().sum(0)).abs() <= gram.diagonal() + 1e-30).all()
    assert bool((found.total_square >= 0).all())
    if any(row.mixes for row in rows):
        assert found.largest is None and found.total_magnitude is None
    else:
        assert found.total_magnitude is not None
        assert ((found.total_magnitude - exact.abs().sum(0)).abs() <= relative * exact.abs().sum(0) + 1e-30).all()
        assert found.largest is not None
        assert torch.allclose(found.largest.double(), exact.abs().amax(0), rtol=2 * EPS32, atol=0)


@pytest.mark.parametrize("kind", ["zeros", "constant", "one outlier", "tiny", "huge"])
def test_hostile_layers_give_numbers(rows: tuple[Transform, ...], kind: str) -> None:
    ones = torch.ones(3, 64)
    hostile = {
        "zeros": ones * 0, "constant": ones * 0.7, "one outlier": ones.index_fill(1, torch.tensor([5]), 1e6),
        "tiny": ones * 1e-38, "huge": ones * 1e30,
    }  # fmt: skip
    for x, weight in ((hostile[kind], ones), (ones, hostile[kind]), (hostile[kind], hostile[kind])):
        if kind == "huge" and grams(rows) and x is hostile[kind]:
            with pytest.raises(InputError, match="infinity"):
                fitted(rows, x, weight)
            continue
        chain = fitted(rows, x, weight)
        assert chain is not None
        assert bool(chain.apply(x).isfinite().all()) and bool(chain.weight(weight).isfinite().all())


def test_every_layer_draws_its_own_seed() -> None:
    seeds = {seed_of(run, name) for run in range(3) for name in ("a", "b", "layers.0.up", "layers.1.up")}
    assert len(seeds) == 12 and all(0 <= seed < 2**64 for seed in seeds)
    assert seed_of(0, "a") == seed_of(0, "a")


def test_the_table_is_consistent() -> None:
    for row in transforms.TRANSFORMS:
        assert transforms.named(row.name) is row and row.source and row.makes in R.STEPS
        assert set(row.limits) == set(row.options)
        row.check(row.options)
