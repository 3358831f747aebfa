# SPDX-License-Identifier: Apache-2.0
"""Layers of the quantized path compute what loaded layers compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit import formats
from fewbit.core.facts import Facts
from fewbit.kernels import native
from fewbit.kernels.reference import round_activations
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.layers import QuantLinear
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Rule, Step
from fewbit.run.rewriting import as_run
from fewbit.run.solve import Solved, Task, solve
from fewbit.run.tasks import propagate

NAME = "model.layers.0.mlp.down_proj"
needs_integers = pytest.mark.skipif(not native.available(), reason="products of integers are compiled")


@pytest.fixture
def model(tiny: Path) -> Iterator[StreamedModel]:
    streamed = StreamedModel.open(open_checkpoint(tiny))
    streamed.load(streamed.blocks[0])
    with torch.no_grad():
        yield streamed


def solved(model: StreamedModel, format: str, activation: str) -> tuple[Solved, Tensor]:
    """A layer that smooths its inputs, whose decoded weight the model holds; and inputs (2, 5, columns)."""
    site = model.site(NAME)
    x = torch.randn(2, 5, site.shape[1], generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 128)
    rule = Rule("*", format, "rtn", activation=activation, transforms=(Step("smooth"),))
    weight, flat = model.weight(NAME).clone(), x.reshape(10, -1)
    done = solve(Task(site, rule, formats.parse(format), weight, [Facts.of(flat)], [flat], 0))
    propagate(model, done)
    return done, x


def loaded(model: StreamedModel, done: Solved) -> QuantLinear:
    """The layer as a folder gives it back."""
    layer = QuantLinear.of(model.module.get_submodule(NAME), done.weight, done.record["activation"])  # type: ignore[arg-type]
    layer.rewrites = done.rewrite.kinds
    for name, array in done.rewrite.arrays.items():
        layer.register_buffer(f"input_{name}", array)
    layer.prepare()
    return layer


@needs_integers
@pytest.mark.parametrize("format", ["int8/channel/sym", "int4/g32/asym"])
@pytest.mark.parametrize("activation", ["int8/channel/sym", "int8/static/asym/s0.05/z100"])
def test_integers_are_multiplied_as_in_the_loaded_layer(model: StreamedModel, format: str, activation: str) -> None:
    done, x = solved(model, format, activation)
    layer = model.module.get_submodule(NAME)
    before, seen = layer(x), []
    assert done.integers is not None
    handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with as_run(model, [done]):
        made = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = layer(x)
    handle.remove()
    assert torch.equal(made, loaded(model, done)(x))
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, made.bfloat16())
    assert all(torch.equal(each, x) for each in seen), "hooks see inputs as they come"
    assert torch.equal(layer(x), before), "afterwards it is what it was"
    exact = round_activations(done.rewrite.apply(x), done.activation).double() @ layer.weight.double().T
    assert float((made - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("activation", ["nf4/g64", "int8/static/asym/mse"])
def test_floats_are_multiplied_elsewhere(model: StreamedModel, activation: str) -> None:
    """In a format that no kernel multiplies as integers; and on a grid that is yet to be fixed, not rounded."""
    done, x = solved(model, "int8/channel/sym", activation)
    layer = model.module.get_submodule(NAME)
    assert done.integers is None
    with as_run(model, [done]):
        made = layer(x)
    rewritten = done.rewrite.apply(x)
    given = rewritten if "static" in activation else round_activations(rewritten, done.activation)
    assert torch.equal(made, torch.nn.functional.linear(given, layer.weight))
