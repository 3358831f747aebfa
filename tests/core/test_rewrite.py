# SPDX-License-Identifier: Apache-2.0
"""The Hadamard product against its definition, chains against their parts, and what files may hold."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.core import rewrite as R
from fewbit.core.facts import Facts
from fewbit.errors import InputError

EPS = torch.finfo(torch.float64).eps
BLOCKS = (1, 2, 4, 32, 64, 128, 2048, 8192)


def sylvester(order: int) -> np.ndarray:
    """``H[i, j] = (-1)^popcount(i & j)``, from the definition."""
    bits = np.array([bin(value).count("1") & 1 for value in range(order)])
    index = np.arange(order)
    return 1.0 - 2.0 * bits[index[:, None] & index[None, :]]


def butterfly(x: Tensor, block: int) -> Tensor:
    """The fast transform, log2(block) rounds of sums and differences."""
    half = 1
    while half < block:
        a, b = x.reshape(*x.shape[:-1], -1, 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], -2).reshape(x.shape)
        half *= 2
    return x


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block", BLOCKS)
def test_hadamard_is_its_definition_and_the_butterfly(block: int) -> None:
    x = normal(3, 2 * block)
    found = R.hadamard(x, block)
    # sums of `block` terms, in whatever order: at most block * eps * their magnitudes
    bound = block * EPS * x.abs().reshape(3, 2, block).sum(-1, keepdim=True).expand(3, 2, block).reshape(x.shape)
    assert ((found - butterfly(x, block)).abs() <= bound).all()
    if block <= 2048:
        exact = (x.reshape(3, 2, block) @ torch.from_numpy(sylvester(block))).reshape(x.shape)
        assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("columns", [1, 2, 6, 24, 33, 96, 128, 320])
def test_a_rotation_is_orthogonal_and_block_diagonal(columns: int) -> None:
    rotation = R.Rotation.random(columns, seed=7)
    matrix = rotation.apply(torch.eye(columns, dtype=torch.float64))
    block = rotation.block
    assert columns % block == 0 and (columns // block) % 2 == 1
    assert (matrix @ matrix.T - torch.eye(columns)).abs().max() <= 4 * block * EPS
    signs = torch.tensor([1 - 2 * (int(rotation.signs[i // 8]) >> i % 8 & 1) for i in range(columns)])
    blocks = torch.block_diag(*[torch.from_numpy(sylvester(block))] * (columns // block))
    assert (matrix - signs.unsqueeze(1) * blocks * block**-0.5).abs().max() <= block * EPS


def test_signs_come_from_the_seed_alone_and_are_fair() -> None:
    columns = 4099
    before = torch.get_rng_state()
    one, again, other = (R.Rotation.random(columns, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.signs, again.signs) and not torch.equal(one.signs, other.signs)
    assert one.signs.dtype == torch.uint8 and one.nbytes == 513 and int(one.signs[-1]) < 8
    # golden: SHAKE-256 of the eight bytes 01 00 ... 00 starts so, and must for as long as files exist
    assert one.signs[:4].tolist() == list(hashlib.shake_256(bytes([1, *[0] * 7])).digest(4))
    minus = sum(int(byte).bit_count() for byte in one.signs.tolist())
    assert abs(minus - columns / 2) < 5 * columns**0.5 / 2


def scale(columns: int, seed: int = 3) -> R.Scale:
    return R.Scale(normal(columns, seed=seed).exp().half())


def test_a_chain_is_its_steps_one_after_the_other() -> None:
    x, weight = normal(5, 24), normal(7, 24, seed=1)
    one, two = scale(24), R.Rotation.random(24, 5)
    chain = R.Chain((one, two))
    assert torch.equal(chain.apply(x), two.apply(one.apply(x)))
    assert torch.equal(chain.inverse(x), one.inverse(two.inverse(x)))
    assert torch.equal(chain.weight(weight), two.weight(one.weight(weight)))
    assert torch.equal(chain.unweight(weight), one.unweight(two.unweight(weight)))
    facts = Facts.of(x, gram=True)
    assert torch.equal(chain.facts(facts).total, two.facts(one.facts(facts)).total)
    assert list(chain.arrays) == ["0_scale", "1_signs"] and chain.nbytes == 2 * 24 + 3
    assert R.Chain().apply(x) is x and R.Chain().arrays == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_inputs_come_out_in_float32(dtype: torch.dtype) -> None:
    chain = R.Chain((scale(8), R.Rotation.random(8, 0)))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    x = normal(2, 3, 8).to(dtype)
    for step in (*chain.steps, chain):
        assert step.apply(x).dtype == step.inverse(x).dtype == wanted and step.apply(x).shape == x.shape


def test_autocast_does_not_reach_a_rotation() -> None:
    rotation, x = R.Rotation.random(64, 0), normal(4, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = rotation.apply(x)
    assert torch.equal(inside, rotation.apply(x))


def test_gradients_pass_and_inference_mode_leaves_nothing_behind() -> None:
    chain = R.Chain((scale(64), R.Rotation.random(64, 9)))
    R._sylvester.cache_clear()
    with torch.inference_mode():
        chain.apply(torch.ones(1, 64, dtype=torch.float64))
    x = normal(2, 64).requires_grad_()
    weights = normal(2, 64, seed=4)
    (chain.apply(x) * weights).sum().backward()
    # d/dx of <x A, G> is G A^T, which is what unweight computes
    assert x.grad is not None and torch.allclose(x.grad, chain.unweight(weights), rtol=0, atol=1e-12)


def test_facts_that_do_not_follow_are_refused() -> None:
    x = normal(5, 8).float()
    with pytest.raises(InputError, match="gram=True"):
        R.Rotation.random(8, 0).facts(Facts.of(x))
    assert R.Rotation.random(8, 0).facts(Facts.of(x, gram=True)).largest is None
    assert scale(8).facts(Facts.of(x)).gram is None


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_finite_and_positive(bad: float) -> None:
    with pytest.raises(InputError, match="finite and positive"):
        R.Scale(torch.tensor([1.0, bad]).half())


def test_restore_gives_the_same_chain_or_says_what_is_wrong() -> None:
    chain = R.Chain((scale(24), R.Rotation.random(24, 5)))
    kinds, arrays = chain.kinds, chain.arrays
    assert {name: (t.dtype, tuple(t.shape)) for name, t in arrays.items()} == R.storage(kinds, 24)
    x = normal(3, 24)
    assert torch.equal(R.restore(kinds, 24, arrays).apply(x), chain.apply(x))
    for broken, match in (
        ({"1_signs": arrays["1_signs"]}, "0_scale.*missing"),
        (arrays | {"0_scale": arrays["0_scale"].float()}, "0_scale.*float32"),
        (arrays | {"1_signs": arrays["1_signs"][:2]}, r"1_signs.*\(2,\)"),
    ):
        with pytest.raises(InputError, match=match):
            R.restore(kinds, 24, broken)
    with pytest.raises(InputError, match=r"'magic'.*scale, rotation"):
        R.storage(["magic"], 24)
