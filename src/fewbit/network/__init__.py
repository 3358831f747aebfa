# SPDX-License-Identifier: Apache-2.0
"""Any torch network, convolutions and linear layers, in few bits: vision, encoders, and what no pipeline knows.

::

    made = fewbit.network.quantize(network, "W8A8_STATIC", inputs=[images])
    made.network(images)                       # runs on the kernels
    fewbit.network.save(made, "out")           # packed bits, manifest
    network = fewbit.network.load("out", Architecture())

The network is in memory as a whole; language models, streamed from disk block by block, go through
:func:`fewbit.quantize`. Batch norms are folded first. Calibration sees the float network (each layer on its own),
or, with ``sequential=True``, what the quantized layers before make of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import formats
from fewbit.core import given
from fewbit.core.defaults import exact
from fewbit.errors import InputError, SpecError, UnsupportedError, first_line
from fewbit.formats.fixed import Fixed
from fewbit.model.convolution import placed_windows
from fewbit.model.product import Product
from fewbit.network import solving
from fewbit.network.distill import distill
from fewbit.network.feeding import Batch, batches_of, feed
from fewbit.network.fold import NORMS, fold_norms
from fewbit.network.folder import load, save
from fewbit.network.functional import AsLayers
from fewbit.network.inline import place_products
from fewbit.network.places import put, without_shortcuts
from fewbit.network.quantized import Quantized
from fewbit.network.sensitivity import WAYS, Loss, OwnLoss, sensitivity
from fewbit.recipe import FLOAT, Recipe, Rule
from fewbit.run.opening import chosen as recipe_chosen
from fewbit.run.planning import check_transforms, made_of, tunable

__all__ = ["Product", "Quantized", "fold_norms", "load", "place_products", "quantize", "save"]


@exact()
def quantize(
    network: nn.Module,
    recipe: str | Recipe,
    inputs: Iterable[Batch] = (),
    *,
    method: str = "rtn",
    options: dict[str, Any] | None = None,
    transforms: Sequence[str | dict[str, Any]] = (),
    tune: Sequence[str | dict[str, Any]] = (),
    activation: str | None = None,
    fold: bool = True,
    correct_bias: bool = False,
    sequential: bool = False,
    loss: str | OwnLoss | None = None,
    labels: Iterable[Any] | None = None,
    seed: int = 0,
    inplace: bool = False,
) -> Quantized:
    """A copy of ``network`` for evaluation, or itself: layers in few bits, products (:class:`Product`) in integers.

    Args:
        recipe: a format (``"int4/channel"``), a scheme (``"W8A8"``, ``"W8A8_STATIC"``), or a :class:`fewbit.Recipe`,
            whose rules match module names, ``kind:conv2d``, ``kind:linear`` and ``kind:product``. Of a product's rule
            its static activation counts, to which each operand is rounded by a grid of its own, and how grids learn.
        inputs: calibration batches: tensors, tuples of arguments or mappings of keywords.
        method, options, transforms, tune, activation: as for :func:`fewbit.quantize`. Transforms are for linear layers;
            a tuning compares the whole network with the float one (:mod:`fewbit.network.distill`).
        fold: fold batch norms into the layers before them; seen on the first batch.
        correct_bias: take the mean error of each layer's output from its bias (:mod:`fewbit.core.correction`).
        sequential: solve each layer on what the quantized ones that run before it make of the inputs, not on what the
            float network does (:mod:`fewbit.network.solving`): a pass a layer.
        loss, labels: what methods that weigh by the Fisher diagonal take the gradient of: "classes" (with labels, the
            default), "values", or a function of output and label (:mod:`fewbit.network.sensitivity`); a tensor a batch.
        seed: what anything random is drawn with.
        inplace: change ``network`` itself, without a copy. Where an error is raised, batch norms may be folded and
            biases corrected, but no layer is quantized.

    Raises:
        SpecError: a rule matches no layer, or nothing would be quantized; an argument is of another kind.
        InputError: data is needed and there is none, or a layer's inputs hold NaN; the message names it.
        UnsupportedError: a layer cannot be done as asked.
    """
    _check_kinds(network, seed)
    _refuse(chosen := recipe_chosen(recipe, method, FLOAT, options, transforms, tune, activation))
    batches, known = batches_of(inputs), Loss.of(loss, labels)
    rules, products, skipped = _decide(network, chosen, bool(batches))
    _need_data(rules, products, correct_bias or sequential, batches)
    _need_own_bias(network, list(rules) if correct_bias else [], batches)
    asking, told = _need_loss(rules, known, batches)
    made = without_shortcuts(network if inplace else _copied(network)).eval()
    folded = fold_norms(made, batches[0]) if fold and batches else {}
    teacher = copy.deepcopy(made).float() if any(rule.tunings() for rule in (rules | products).values()) else made
    weighed = sensitivity(made, asking, batches, known, seed) if known is not None and asking else {}
    asked = solving.Asked(rules, products, batches, weighed, correct_bias, seed)
    found = (solving.sequential if sequential else solving.independent)(made, asked)
    layers, records = _replace(made, distill(teacher, made, found, asked), products)
    if batches:
        feed(made, batches[0])  # what its code asks quantized layers for shows now, not when it is used
    skipped = [left for left in skipped if left["name"] not in folded]
    return Quantized(made, chosen, layers, skipped, folded, seed, len(batches), sequential, records, told)


def _check_kinds(network: Any, seed: Any) -> None:
    """Refuse what is no network, or no seed."""
    if not isinstance(network, nn.Module):
        raise InputError(f"quantizing a {type(network).__name__}", "it is no torch.nn.Module", "the network itself")
    if type(network) in (*solving.SITES, Product):
        found = "it is a layer by itself, and would have to be replaced in what holds it"
        raise InputError(f"quantizing a {type(network).__name__}", found, "torch.nn.Sequential(layer)")
    given.kind("seed", seed, int, "a whole number")
    for name, parameter in network.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            found = f"{name} has no shape before the network has run (nn.LazyLinear, say)"
            raise InputError(f"quantizing a {type(network).__name__}", found, "network(batch) first")


def _copied(network: nn.Module) -> nn.Module:
    """Raises InputError: it holds what cannot be copied."""
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:
        works = "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove first, or inplace=True"
        raise InputError(f"a copy of a {type(network).__name__}", first_line(error), works) from error


def _refuse(recipe: Recipe) -> None:
    """Refuse what only a language model can have."""
    if recipe.model is not None:
        found = "it rotates the residual stream of a language model"
        raise UnsupportedError(f"{recipe.model.name} of a network", found, "transforms of layers")
    if recipe.end is not None:
        found = "it foretells no tokens; tunings of layers compare the whole network already"
        raise UnsupportedError(f"{recipe.end.name} of a network", found, 'tune=["scales"]')


def _replace(
    network: nn.Module, found: solving.Solutions, products: dict[str, Rule]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Put quantized layers and products where the float ones are; returns their records."""
    layers, modules = [], dict(network.named_modules())
    for name, item in found.solved.items():
        layer, grid = modules[name], found.grids.get(name)
        record = item.record
        if grid is not None:
            record = {**record, "activation": grid.name}
        layers.append({**record, "bias": layer.bias is not None})
        if isinstance(layer, nn.Conv2d):
            layers[-1] |= placed_windows(layer)
        put(network, name, solving.quantized(layer, item, record["activation"]))
    integers = {name: solving.product(name, rule, found.grids) for name, rule in products.items()}
    for name, product in integers.items():
        put(network, name, product)
    return layers, [{"name": name, **product.record()} for name, product in integers.items()]


def _decide(
    network: nn.Module, recipe: Recipe, ran: bool
) -> tuple[dict[str, Rule], dict[str, Rule], list[dict[str, Any]]]:
    """The rules of layers and products to quantize, and every other product or module with parameters as (name,
    reason)."""
    rules: dict[str, Rule] = {}
    products: dict[str, Rule] = {}
    skipped: list[dict[str, Any]] = []
    kinds = {**solving.SITES, Product: solving.PRODUCT}
    modules = list(network.named_modules())
    known = {name: type(module) for name, module in modules if type(module) in kinds}
    named = {name: (name, kinds[cls], cls.__name__) for name, cls in known.items()}
    recipe.check(list(named.values()))
    for name, module in modules:
        rule = recipe.rule_for(*named[name]) if name in named else None
        reason = _kept(name, module, rule, ran)
        if reason is None and rule is not None:
            (products if type(module) is Product else rules)[name] = rule
            continue
        own = list(module.parameters(recurse=False))
        count, nbytes = sum(p.numel() for p in own), sum(p.nbytes for p in own)
        if count or type(module) is Product:
            skipped.append({"name": name, "reason": reason, "nbytes": nbytes, "parameters": count})
    if not rules:
        raise SpecError("quantizing a network", "every layer would stay in float", "give a rule with a format")
    return rules, products, skipped


def _kept(name: str, module: nn.Module, rule: Rule | None, ran: bool) -> str | None:
    """None, or why ``module`` stays as it is under ``rule``, which matches it or is None."""
    if type(module) is Product:
        return solving.refuse_product(name, rule)
    if type(module) not in solving.SITES:
        if isinstance(module, NORMS) and not ran:
            return "without inputs, nobody sees which layer it follows"
        return f"{type(module).__name__} is no {' or '.join(cls.__name__ for cls in solving.SITES)}"
    if rule is None or rule.format == FLOAT:
        return "the recipe keeps it in float" if rule else "no rule of the recipe matches it"
    assert isinstance(module.weight, Tensor)
    if not module.weight.numel():
        return "its weight is empty"
    _check(name, solving.SITES[type(module)], module, rule)
    return None


def _check(name: str, kind: str, layer: nn.Module, rule: Rule) -> None:
    """Refuse what is asked of a layer that only a language model's blocks can have, or that its kind cannot."""
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        found = "its weight is made anew of other parameters each time that it runs (weight norm, pruning)"
        works = "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove first"
        raise InputError(f"quantizing {name}", found, works)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        found = f"its weight is {weight.dtype}; kernels run in float32, bfloat16 and float16"
        raise UnsupportedError(f"quantizing {name}", found, f'network.float(), or format "float" for {name}')
    if kind == "conv2d" and rule.transforms:
        found = "inputs of convolutions are not rewritten at run time"
        raise UnsupportedError(f"transforms for {name}", found, "give convolutions a rule without transforms")
    activation = rule.input_format
    if kind == "conv2d" and activation is not None and activation.whole:
        found = "inputs of convolutions are rounded window by window"
        raise UnsupportedError(f"activations in {activation.name} for {name}", found, "int8/static or int8/channel")
    site = solving.site_of(name, layer)
    check_transforms(site, rule)
    made_of(site, rule)
    for tune in rule.tunings():
        format = formats.parse(rule.format)
        reason, works = tune.row().refuse(format), tunable(format)
        if kind == "conv2d" and activation is not None and not isinstance(activation, Fixed):
            reason, works = "inputs of convolutions are rounded window by window", "int8/static as the activation"
        if reason is not None:
            raise UnsupportedError(f"tuning {tune.name} of {rule.format} for {name}", reason, works)


def _need_data(rules: dict[str, Rule], products: dict[str, Rule], more: bool, batches: list[Batch]) -> None:
    """``more``: something else asks for it."""
    asking = [name for name, rule in rules.items() if rule.calibrated]
    asking += [name for name, rule in products.items() if rule.open_grid]
    if batches or not (asking or more):
        return
    what = "bias correction, or solving layers in sequence"
    if asking:
        what = f"the method, transform, tuning or static activations of {asking[0]}"
    raise InputError(what, "no inputs were given to calibrate on", "inputs=[batch, ...]")


def _need_own_bias(network: nn.Module, names: list[str], batches: list[Batch]) -> None:
    """Refuse to correct the biases of layers ``names`` where the network's own code leaves one out."""
    if not names:
        return
    feed(network, batches[0], calls := AsLayers(network))
    if left := [name for name in names if name in calls.other_bias]:
        found = "the network's own code multiplies by its weight with another bias than the layer's, or none"
        raise UnsupportedError(f"correcting the bias of {left[0]}", found, "correct_bias=False")


def _need_loss(rules: dict[str, Rule], loss: Loss | None, batches: list[Batch]) -> tuple[list[str], str | None]:
    """The layers whose method weighs by the Fisher diagonal, and of which loss; None without such layers."""
    names = [name for name, rule in rules.items() if rule.row().needs == "fisher"]
    if names and loss is None:
        found = "it weighs by the gradient of the network's loss, and a network does not say which that is"
        raise InputError(f"method {rules[names[0]].method} for {names[0]}", found, WAYS)
    if loss is not None:
        loss.check(batches)
    return names, loss.name if names and loss is not None else None
