# SPDX-License-Identifier: Apache-2.0
"""The layers of a network solved, each on its own or one after the other.

Independent: every layer sees what the float network makes of the calibration, all of it in one pass. Sequential: in the
order in which they run, each layer sees what those before it, quantized already and with rounded inputs, make of it,
as the blocks of a language model do (:mod:`fewbit.run.sequential`): a pass a layer, which ends where the layer does.
Errors of the layers before are then part of what a method weighs, grids hold the numbers that will come, and a
corrected bias takes the mean error of all of them away, not of the layer's own weight alone (the empirical correction
of Nagel et al. 2019, arXiv:1906.04721)::

    independent    b' = b + (W - W') E[x]
    sequential     b' = b + (W - W') E[x'] + W (E[x] - E[x'])          x: in the float network, x': in the quantized one
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbit import formats, methods
from fewbit import transforms as table
from fewbit.containers import terms as T
from fewbit.core.correction import correction
from fewbit.core.transform import seed_of
from fewbit.formats.fixed import Fixed
from fewbit.model.convolution import QuantConv2d, window_of
from fewbit.model.layers import QuantLinear
from fewbit.model.sites import Site
from fewbit.network.feeding import Batch, Last, Wanted, calls, look
from fewbit.recipe import Rule
from fewbit.run.solve import Solved, Task, solve

SITES: dict[type[nn.Module], str] = {nn.Conv2d: "conv2d", nn.Linear: "linear"}
"""Classes that are quantized, by kind. Not those derived from them, which may do other things with the weight."""

Solutions = tuple[dict[str, Solved], dict[str, Fixed]]
"""What stands for the weights, and the grids that calibration fixed for inputs; by layer."""


def independent(
    network: nn.Module, rules: dict[str, Rule], batches: list[Batch], correct_bias: bool, seed: int
) -> Solutions:
    """Solve the layers of ``network`` that ``rules`` names, each on the inputs that it has in float. What is corrected
    are the biases of ``network``."""
    wanted = {name: wanted_of(network.get_submodule(name), rule, correct_bias) for name, rule in rules.items()}
    look(network, batches if any(want.facts for want in wanted.values()) else batches[:1], wanted)
    solved = {name: solve(_task(network, name, rule, wanted[name], seed)) for name, rule in rules.items()}
    grids = _grids(network, rules, solved, batches)
    if correct_bias:
        for name, item in solved.items():
            _correct(network.get_submodule(name), item, wanted[name].mean, wanted[name].mean)
    return solved, grids


def sequential(
    network: nn.Module, rules: dict[str, Rule], batches: list[Batch], correct_bias: bool, seed: int
) -> Solutions:
    """As :func:`independent`, each on what the quantized layers before it make of ``batches``. Layers that never
    run are solved last, without data."""
    counts = [calls(network, batch, rules) for batch in batches]
    order = [*dict.fromkeys(name for count in counts for name in count)]
    order += [name for name in rules if name not in order]
    floating = {name: wanted_of(network.get_submodule(name), rule, True) for name, rule in rules.items()}
    if correct_bias:
        look(network, batches, floating)
    running, solved, grids = copy.deepcopy(network), dict[str, Solved](), dict[str, Fixed]()
    for name in order:
        rule, last = rules[name], [(name, count[name]) for count in counts]
        want = wanted_of(network.get_submodule(name), rule, correct_bias)
        look(running, batches if want.facts else batches[:1], {name: want}, last)
        item = solved[name] = solve(_task(network, name, rule, want, seed))
        grids |= _grids(running, {name: rule}, solved, batches, last)
        layer = network.get_submodule(name)
        if correct_bias:
            _correct(layer, item, floating[name].mean, want.mean)
        grid = grids.get(name)
        running.set_submodule(name, quantized(layer, item, item.record["activation"] if grid is None else grid.name))
    return {name: solved[name] for name in rules}, grids


def wanted_of(layer: nn.Module, rule: Rule, correct_bias: bool) -> Wanted:
    window = window_of(layer) if isinstance(layer, nn.Conv2d) else None
    assert isinstance(layer.weight, Tensor)
    needs = [methods.named(rule.method).needs, *(table.named(step.name).needs for step in rule.transforms)]
    facts = correct_bias or any(need != "nothing" for need in needs)
    return Wanted(layer.weight[0].numel(), window, rule.needs == "gram", facts, False)


def site_of(name: str, layer: nn.Module) -> Site:
    """A convolution or linear layer as the matrix that it is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = (len(weight), weight[0].numel())
    return Site(name, SITES[type(layer)], f"{name}.weight", shape, 1, None, None)  # type: ignore[arg-type]


def _task(network: nn.Module, name: str, rule: Rule, want: Wanted, seed: int) -> Task:
    layer = network.get_submodule(name)
    site, weight = site_of(name, layer), layer.weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().float().reshape(site.shape)
    shown = torch.cat(want.shown) if want.shown and (want.window is None or want.window.groups == 1) else None
    seen = torch.zeros(0, site.shape[1]) if shown is None else shown
    return Task(site, rule, formats.parse(rule.format), matrix, [want.known()], [seen], seed_of(seed, name))


def _grids(
    network: nn.Module, rules: dict[str, Rule], solved: dict[str, Solved], batches: list[Batch], last: Last = ()
) -> dict[str, Fixed]:
    """Of static activations: fixed by what leaves the rewrite of each layer, on all batches."""
    waiting = [name for name, rule in rules.items() if rule.open_grid]
    if not waiting:
        return {}
    wanted = {}
    for name in waiting:
        columns = solved[name].record["shape"][1]
        wanted[name] = replace(Wanted(columns, None, False, False, True), rewrite=solved[name].rewrite)
    look(network, batches, wanted, last)
    return {name: _grid(rules[name]).observed(wanted[name].seen) for name in waiting}


def _grid(rule: Rule) -> Fixed:
    found = formats.parse(str(rule.activation))
    assert isinstance(found, Fixed)
    return found


@torch.no_grad()
def _correct(layer: nn.Module, item: Solved, floating: Tensor, mean: Tensor) -> None:
    """``floating``: E[x] of the float network; ``mean``: of what the layer will see."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight.detach().float().reshape(len(layer.weight), -1)
    more = correction(weight, item.rewrite.unweight(item.weight.dequantize()), mean)
    more += correction(weight, torch.zeros_like(weight), floating - mean)
    bias = more if layer.bias is None else layer.bias.float() + more
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))


def quantized(layer: nn.Module, item: Solved, activation: str | None) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d.of(layer, item.weight, activation)
    assert isinstance(layer, nn.Linear)
    made = QuantLinear(T.describe(item.weight), layer.bias, activation, item.rewrite.kinds)
    made.fill(item.weight)
    for name, array in item.rewrite.arrays.items():
        getattr(made, f"input_{name}").copy_(array)
    return made.eval()
