# SPDX-License-Identifier: Apache-2.0
"""The core's rewrites against dense matrices in float64, under every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit import kernels
from fewbit.core.orders import paley
from fewbit.core.rewrite import Chain, Hadamard, Rotation, Scale, Step
from fewbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(step: Step, columns: int) -> Tensor:
    """A of ``x' = x A``, from the definition."""
    if isinstance(step, Scale):
        return torch.diag(step.scale.double())
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < step.block:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    block = torch.kron(paley(step.order), sylvester)
    signs = [1 - 2 * (int(step.signs[i // 8]) >> i % 8 & 1) for i in range(columns)]
    mixing = torch.block_diag(*[block] * (columns // len(block))) / len(block) ** 0.5
    return torch.diag(torch.tensor(signs, dtype=torch.float64)) @ mixing


@pytest.mark.parametrize("isa", native.isas() if native.available() else [])
@pytest.mark.parametrize(("columns", "tokens"), [(12, 1), (288, 7), (96, 31), (64, 33), (560, 3), (6, 5)])
def test_a_chain_is_the_product_with_its_matrices(
    isa: native.Isa, columns: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "isas", lambda: [isa])
    last = Rotation.random(columns, 3) if columns == 6 else Hadamard.random(columns, 3)
    chain = Chain((Scale(normal(columns, seed=1).exp().half()), Rotation.random(columns, 2), last))
    x = normal(tokens, columns, seed=4).float()
    exact, spread = x.double(), x.double().abs()
    for step in chain.steps:
        exact, spread = exact @ dense(step, columns), spread @ dense(step, columns).abs()
    found = kernels.Rewriting(chain)(x.reshape(tokens, 1, columns))
    assert found.shape == (tokens, 1, columns) and found.dtype == torch.float32
    # each step is a product, then sums of at most `columns` terms in some order
    bound = 3 * (columns + 2) * 2.0**-24 * spread
    assert ((found.reshape(tokens, columns).double() - exact).abs() <= bound).all()


def test_what_the_core_does_not_take_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain((Hadamard.random(24, 3),))
    rewriting, x = kernels.Rewriting(chain), normal(5, 24, seed=1)
    assert torch.equal(rewriting(x), chain.apply(x)) and rewriting(x[:0].float()).shape == (0, 24)
    half = x.bfloat16()
    assert rewriting(half).dtype == torch.float32
    assert (rewriting(half) - chain.apply(half)).abs().max() < 1e-5
    wanting = x.float().requires_grad_()
    rewriting(wanting).sum().backward()
    assert wanting.grad is not None
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(rewriting(x.float()), chain.apply(x.float()))
