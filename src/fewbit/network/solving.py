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
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewbit import formats
from fewbit.containers import terms as T
from fewbit.core.correction import correction
from fewbit.core.facts import Facts
from fewbit.core.rewrite import Chain
from fewbit.errors import UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.model.convolution import QuantConv2d, margin_of, window_of
from fewbit.model.layers import QuantLinear
from fewbit.model.product import QuantProduct
from fewbit.model.sites import Site
from fewbit.network.feeding import Batch, Last, Wanted, calls, look
from fewbit.network.places import put
from fewbit.network.sensitivity import Sensitivity
from fewbit.recipe import FLOAT, Rule
from fewbit.run.solve import Solved, Task, solve

SITES: dict[type[nn.Module], str] = {nn.Conv2d: "conv2d", nn.Linear: "linear"}
"""Classes that are quantized, by kind. Not those derived from them, which may do other things with the weight."""

PRODUCT = "product"
"""The kind of a :class:`fewbit.model.product.Product`."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a network: the ``rules`` of its layers and ``products``, by name; ``batches`` to calibrate on;
    ``sensitive``: of the float network, of the layers whose method weighs by it; ``correct_bias``: whether the biases
    of layers are corrected; ``seed``: what anything random is drawn with."""

    rules: dict[str, Rule]
    products: dict[str, Rule]
    batches: list[Batch]
    sensitive: Mapping[str, Sensitivity]
    correct_bias: bool
    seed: int


@dataclass(frozen=True, eq=False)
class Solutions:
    """What stands for the weights, by layer, and ``grids`` of inputs that calibration fixed, by layer or operand."""

    solved: dict[str, Solved]
    grids: dict[str, Fixed]


def operands(product: str) -> tuple[str, str]:
    """Names of what the operands of a product pass."""
    return f"{product}.left", f"{product}.right"


def by_operand(products: Mapping[str, Rule]) -> dict[str, Rule]:
    """Rules of ``products`` by the names of their operands."""
    return {side: rule for name, rule in products.items() for side in operands(name)}


def independent(network: nn.Module, asked: Asked) -> Solutions:
    """Solve the layers of ``network`` that rules name, and find the grids of products, each on the inputs that it has
    in float. What is corrected are the biases of ``network``."""
    layers, rules, batches = dict(network.named_modules()), asked.rules, asked.batches
    wanted: dict[str, Wanted] = {}
    if batches:
        wanted = {name: wanted_of(layers[name], rule, asked.correct_bias) for name, rule in rules.items()}
        look(network, batches if any(want.facts for want in wanted.values()) else batches[:1], wanted)
    unseen = functools.cache(_unseen)  # the same of all layers of a width
    solved = {}
    for name in rules:
        site = site_of(name, layers[name])
        inputs = wanted[name].inputs() if batches else unseen(site.shape[1])
        solved[name] = solve(_task(site, layers[name], asked, inputs))
    rounded = {name: (rule, solved[name].rewrite) for name, rule in rules.items()}
    rounded |= {side: (rule, Chain()) for side, rule in by_operand(asked.products).items()}
    grids = _grids(network, rounded, batches)
    if asked.correct_bias:
        for name, item in solved.items():
            _correct(layers[name], item, wanted[name].mean, wanted[name].mean)
    return Solutions(solved, grids)


def sequential(network: nn.Module, asked: Asked) -> Solutions:
    """As :func:`independent`, each on what the quantized layers before it make of the batches. Layers that never
    run are solved last, without data."""
    rules, products, batches = asked.rules, asked.products, asked.batches
    counts = [calls(network, batch, [*rules, *products]) for batch in batches]
    order = [*dict.fromkeys(name for count in counts for name in count)]
    order += [name for name in rules if name not in order]
    floating = {name: wanted_of(network.get_submodule(name), rule, True) for name, rule in rules.items()}
    if asked.correct_bias:
        look(network, batches, floating)
    running, solved, grids = copy.deepcopy(network), dict[str, Solved](), dict[str, Fixed]()
    for name in order:
        if name in products:
            sides = operands(name)
            rounded = {side: (products[name], Chain()) for side in sides}
            grids |= _grids(running, rounded, batches, [(sides[1], count[name]) for count in counts])
            put(running, name, product(name, products[name], grids))
            continue
        rule, last = rules[name], [(name, count[name]) for count in counts]
        want = wanted_of(network.get_submodule(name), rule, asked.correct_bias)
        look(running, batches if want.facts else batches[:1], {name: want}, last)
        layer = network.get_submodule(name)
        item = solved[name] = solve(_task(site_of(name, layer), layer, asked, want.inputs()))
        grids |= _grids(running, {name: (rule, item.rewrite)}, batches, last)
        if asked.correct_bias:
            _correct(layer, item, floating[name].mean, want.mean)
        grid = grids.get(name)
        put(running, name, quantized(layer, item, item.record["activation"] if grid is None else grid.name))
    return Solutions({name: solved[name] for name in rules}, grids)


def wanted_of(layer: nn.Module, rule: Rule, correct_bias: bool) -> Wanted:
    window, margin = (window_of(layer), margin_of(layer)) if isinstance(layer, nn.Conv2d) else (None, None)
    assert isinstance(layer.weight, Tensor)
    needs = [rule.row().needs, *(step.row().needs for step in rule.transforms)]
    facts = correct_bias or any(need != "nothing" for need in needs)
    return Wanted(layer.weight[0].numel(), window, rule.needs == "gram", facts, False, margin)


def site_of(name: str, layer: nn.Module) -> Site:
    """A convolution or linear layer as the matrix that it is."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape = (weight.shape[0], weight.numel() // weight.shape[0])
    return Site(name, SITES[type(layer)], f"{name}.weight", shape, 1, None, None)  # type: ignore[arg-type]


def _unseen(columns: int) -> tuple[Facts, Tensor]:
    """As :meth:`Wanted.inputs`, of a layer that saw no data."""
    return Facts.none(columns), torch.zeros(0, columns)


def _task(site: Site, layer: nn.Module, asked: Asked, inputs: tuple[Facts, Tensor]) -> Task:
    """``inputs``: facts of them, and those that the error is measured on."""
    weight, (known, seen) = layer.weight, inputs
    rule, sensitive = asked.rules[site.name], asked.sensitive.get(site.name)
    assert isinstance(weight, Tensor)
    matrix = weight.detach().float().flatten(1)
    known = known if sensitive is None else sensitive.beside(known)
    return Task(site, rule, formats.parse(rule.format), matrix, [known], [seen], asked.seed)


def _grids(
    network: nn.Module, asked: dict[str, tuple[Rule, Chain]], batches: list[Batch], last: Last = ()
) -> dict[str, Fixed]:
    """Of static activations that are open in the rules ``asked``: fixed by what leaves the rewrite of each layer, on
    all batches."""
    waiting = {name: rule for name, (rule, _) in asked.items() if rule.open_grid}
    if not waiting:
        return {}
    wanted = {name: replace(Wanted(1, None, False, False, True), rewrite=asked[name][1]) for name in waiting}
    look(network, batches, wanted, last)
    return {name: grid_of(rule).observed(wanted[name].seen) for name, rule in waiting.items()}


def grid_of(rule: Rule) -> Fixed:
    """Static activations of ``rule``, open or spelt."""
    found = rule.input_format
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
    plain, kinds = T.of_entry(item.record), item.rewrite.kinds
    made = QuantLinear(plain, layer.bias, activation, kinds, item.weight, layer.weight.dtype)
    for name, array in item.rewrite.arrays.items():
        getattr(made, f"input_{name}").copy_(array)
    return made.eval()


def product(name: str, rule: Rule, grids: dict[str, Fixed]) -> QuantProduct:
    return QuantProduct(*(grids.get(side, grid_of(rule)).name for side in operands(name)))


def refuse_product(name: str, rule: Rule | None) -> str | None:
    """None, or why the product ``name`` stays in float under ``rule``.

    Raises:
        UnsupportedError: the rule is of products, and they cannot be done as it asks.
    """
    if rule is None:
        return "no rule of the recipe matches it"
    if rule.format == FLOAT or rule.activation is None:
        return "the recipe keeps it in float" if rule.format == FLOAT else "the recipe keeps activations in float"
    if isinstance(rule.input_format, Fixed):
        return None
    found = f"each operand takes one grid, and {rule.activation} is found token by token"
    if rule.match in (name, f"kind:{PRODUCT}"):
        raise UnsupportedError(f"product {name} in integers", found, "int8/static as the activation")
    return found
