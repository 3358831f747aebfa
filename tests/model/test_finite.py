# SPDX-License-Identifier: Apache-2.0
"""Where activations stop being numbers, in small modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.errors import InputError
from fewbit.model.finite import finite


class Residual(nn.Module):
    """x + f(x)"""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def chain(*scales: float) -> nn.Sequential:
    """Layers that multiply by ``scales``, an activation between them."""
    layers: list[nn.Module] = []
    for scale in scales:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, scale)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def refusal(module: nn.Module, x: Tensor) -> str:
    with pytest.raises(InputError) as refused:
        finite(module(x), "net", module, lambda twin: twin(x))
    return f"{refused.value.asked}; {refused.value.found}"


@torch.no_grad()
def test_the_first_layer_that_makes_or_sees_what_is_no_number_is_named() -> None:
    x = torch.tensor([[1.0], [0.0], [1.0]])
    assert refusal(chain(1, 1e30, 1e30, 1), x) == "activations of net.4; 2 of 3 of its outputs are NaN or infinite"
    assert refusal(chain(1, 1), x / 0) == "activations of net.0; 3 of 3 of its inputs are NaN or infinite"
    squared = nn.Sequential(chain(1e30), Residual(chain(1)))
    squared[0].register_forward_hook(lambda module, arguments, made: made.square())
    assert refusal(squared, x) == "activations of net.1.inside.0; 2 of 3 of its inputs are NaN or infinite"
    assert refusal(Residual(chain(1)), 3e38 * x) == "activations of net; 2 of 3 of its outputs are NaN or infinite"


@torch.no_grad()
def test_finite_values_pass_as_they_are_and_hooks_stay() -> None:
    module, x = chain(2), torch.ones(3, 1)
    seen: list[Tensor] = []
    module[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    made = module(x)
    assert finite(made, "net", module, lambda twin: pytest.fail("not run again")) is made
    refusal(module, x * torch.inf)
    assert len(seen) == 2 and len(module[0]._forward_pre_hooks) == 1  # the twin stopped before the hook
