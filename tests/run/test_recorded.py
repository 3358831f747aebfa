# SPDX-License-Identifier: Apache-2.0
"""A recorded function gives what the function gives, on what it is called with now."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fewbit.run.recorded import Part, Recorded

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parts(seed: int, device: torch.device) -> list[Part]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 8, generator=generator).to(device), torch.randn(8, generator=generator).to(device))] * 2


def test_on_a_processor_it_is_called_with_what_is_given() -> None:
    given = iter(parts(0, CPU))
    assert Recorded(lambda read: read, CPU)(given) is given


@gpu
def test_a_gpu_starts_again_what_was_recorded() -> None:
    """With gradients, and with values that move in between, as tunings have them."""
    device, calls = torch.device("cuda"), []
    value = torch.ones(8, device=device)

    def slope(read: Iterable[Part]) -> list[Tensor]:
        calls.append(1)
        leaf = value.clone().requires_grad_()
        with torch.enable_grad():
            loss = sum(((a * leaf - b) ** 2).sum() for a, b in read)
            return list(torch.autograd.grad(loss, [leaf]))  # type: ignore[arg-type]

    recorded = Recorded(slope, device)
    with torch.no_grad():
        for seed in range(5):
            found = recorded(parts(seed, device))[0].clone()
            assert torch.equal(found, slope(parts(seed, device))[0])
            calls.pop()
            value.mul_(1.5)
    assert len(calls) == 2  # prepared, recorded


@gpu
def test_what_waits_for_the_gpu_is_called_each_time() -> None:
    device = torch.device("cuda")
    recorded = Recorded(lambda read: [a.sum().item() for a, _ in read], device)
    for seed in range(4):
        assert recorded(parts(seed, device)) == [a.sum().item() for a, _ in parts(seed, device)]
