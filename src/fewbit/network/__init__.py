# SPDX-License-Identifier: Apache-2.0
"""Any torch network, convolutions and linear layers, in few bits: vision, encoders, and what no pipeline knows.

::

    made = fewbit.network.quantize(network, "W8A8_STATIC", inputs=[images])
    made.network(images)                       # runs on the kernels
    fewbit.network.save(made, "out")           # packed bits, manifest
    network = fewbit.network.load("out", Architecture())

The network is in memory as a whole; language models, streamed from disk block by block, go through
:func:`fewbit.quantize`. Calibration sees the float network (each layer on its own), with batch norms folded first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import formats, methods
from fewbit import transforms as table
from fewbit.containers import terms as T
from fewbit.core.correction import correction
from fewbit.core.transform import seed_of
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.formats.fixed import Fixed
from fewbit.model.convolution import QuantConv2d, window_of
from fewbit.model.layers import QuantLinear
from fewbit.model.sites import Site
from fewbit.network.distill import distill
from fewbit.network.feeding import Batch, Wanted, look
from fewbit.network.fold import NORMS, fold_norms
from fewbit.network.folder import load, save
from fewbit.network.quantized import Quantized
from fewbit.recipe import FLOAT, Recipe, Rule
from fewbit.run.solve import Solved, Task, solve

__all__ = ["Quantized", "fold_norms", "load", "quantize", "save"]

SITES: dict[type[nn.Module], str] = {nn.Conv2d: "conv2d", nn.Linear: "linear"}
"""Classes that are quantized, by kind. Not those derived from them, which may do other things with the weight."""


def quantize(
    network: nn.Module,
    recipe: str | Recipe,
    inputs: Iterable[Batch] = (),
    *,
    method: str = "rtn",
    options: dict[str, Any] | None = None,
    transforms: Sequence[str | dict[str, Any]] = (),
    tune: Sequence[str | dict[str, Any]] = (),
    fold: bool = True,
    correct_bias: bool = False,
    seed: int = 0,
) -> Quantized:
    """A copy of ``network`` for evaluation, its convolutions and linear layers in few bits.

    Args:
        recipe: a format (``"int4/channel"``), a scheme (``"W8A8"``, ``"W8A8_STATIC"``), or a :class:`fewbit.Recipe`,
            whose rules match module names, ``kind:conv2d`` and ``kind:linear``.
        inputs: calibration batches, each a tensor, a tuple of arguments or a mapping of keywords. What looks at no data
            needs none.
        method, options, transforms, tune: as for :func:`fewbit.quantize`. Transforms are for linear layers; a tuning
            compares the whole network with the float one (:mod:`fewbit.network.distill`).
        fold: fold batch norms into the layers before them; seen on the first batch.
        correct_bias: take the mean error of each layer's output from its bias (:mod:`fewbit.core.correction`).
        seed: what anything random is drawn with.

    Raises:
        SpecError: a rule matches no layer, or nothing would be quantized.
        InputError: data is needed and there is none, or a layer's inputs hold NaN; the message names it.
        UnsupportedError: a layer cannot be done as asked.
    """
    chosen = Recipe.simple(recipe, method, FLOAT, options, transforms, tune) if isinstance(recipe, str) else recipe
    if chosen.model is not None:
        found = "it rotates the residual stream of a language model"
        raise UnsupportedError(f"{chosen.model.name} of a network", found, "transforms of layers")
    if chosen.end is not None:
        found = "it foretells no tokens; tunings of layers compare the whole network already"
        raise UnsupportedError(f"{chosen.end.name} of a network", found, 'tune=["scales"]')
    made, batches = copy.deepcopy(network).eval(), list(inputs)
    folded = fold_norms(made, batches[0]) if fold and batches else {}
    rules, skipped = _decide(made, chosen, bool(batches))
    wanted = {name: _wanted(made.get_submodule(name), rule, correct_bias) for name, rule in rules.items()}
    _need_data(rules, correct_bias, batches)
    look(made, batches if any(want.facts for want in wanted.values()) else batches[:1], wanted)
    solved = {name: solve(_task(made, name, rule, wanted[name], seed)) for name, rule in rules.items()}
    grids = _grids(made, rules, solved, batches)
    teacher = copy.deepcopy(made) if any(rule.tunings() for rule in rules.values()) else made
    if correct_bias:
        for name, item in solved.items():
            _correct(made.get_submodule(name), item, wanted[name].mean)
    solved, grids = distill(teacher, made, solved, grids, batches, seed)
    layers = []
    for name, item in solved.items():
        layer, grid = made.get_submodule(name), grids.get(name)
        record = item.record
        if grid is not None:
            record = {**record, "activation": grid.name}
        layers.append({**record, "bias": layer.bias is not None})
        made.set_submodule(name, _layer(layer, item, record["activation"]))
    return Quantized(made, chosen, layers, skipped, folded, seed, len(batches))


def _decide(network: nn.Module, recipe: Recipe, ran: bool) -> tuple[dict[str, Rule], list[dict[str, Any]]]:
    """The rule of each layer to quantize, and every other module with parameters as (name, reason)."""
    rules: dict[str, Rule] = {}
    skipped: list[dict[str, Any]] = []
    named = [
        (name, SITES[type(module)], type(module).__name__)
        for name, module in network.named_modules()
        if type(module) in SITES
    ]
    recipe.check(named)
    for name, module in network.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        kind = SITES.get(type(module))
        rule = None if kind is None else recipe.rule_for(name, kind, type(module).__name__)
        if kind is None:
            reason = f"{type(module).__name__} is no {' or '.join(cls.__name__ for cls in SITES)}"
            if isinstance(module, NORMS) and not ran:
                reason = "without inputs, nobody sees which layer it follows"
        elif rule is None or rule.format == FLOAT:
            reason = "the recipe keeps it in float" if rule else "no rule of the recipe matches it"
        else:
            _check(name, kind, rule)
            rules[name] = rule
            continue
        own = list(module.parameters(recurse=False))
        count, nbytes = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
        skipped.append({"name": name, "reason": reason, "nbytes": nbytes, "parameters": count})
    if not rules:
        raise SpecError("quantizing a network", "every layer would stay in float", "give a rule with a format")
    return rules, skipped


def _check(name: str, kind: str, rule: Rule) -> None:
    """Refuse what is asked of a layer that only a language model's blocks can have, or that its kind cannot."""
    if kind == "conv2d" and rule.transforms:
        found = "inputs of convolutions are not rewritten at run time"
        raise UnsupportedError(f"transforms for {name}", found, "give convolutions a rule without transforms")
    activation = formats.parse(rule.activation) if rule.activation else None
    for tune in rule.tunings():
        reason, works = methods.tuning(tune.name).refuse(formats.parse(rule.format)), "leave the tuning out"
        if kind == "conv2d" and activation is not None and not isinstance(activation, Fixed):
            reason, works = "inputs of convolutions are rounded window by window", "int8/static as the activation"
        if reason is not None:
            raise UnsupportedError(f"tuning {tune.name} of {rule.format} for {name}", reason, works)
    if methods.named(rule.method).needs == "fisher":
        found = "the Fisher diagonal is collected of language models only"
        raise UnsupportedError(f"method {rule.method} for {name}", found, "clip or gptq, of the same formats")


def _need_data(rules: dict[str, Rule], correct_bias: bool, batches: list[Batch]) -> None:
    asking = [name for name, rule in rules.items() if rule.calibrated]
    if batches or not (asking or correct_bias):
        return
    what = f"the method, transform, tuning or static activations of {asking[0]}" if asking else "bias correction"
    raise InputError(what, "no inputs were given to calibrate on", "inputs=[batch, ...]")


def _wanted(layer: nn.Module, rule: Rule, correct_bias: bool) -> Wanted:
    window = window_of(layer) if isinstance(layer, nn.Conv2d) else None
    assert isinstance(layer.weight, Tensor)
    needs = [methods.named(rule.method).needs, *(table.named(step.name).needs for step in rule.transforms)]
    facts = correct_bias or any(need != "nothing" for need in needs)
    return Wanted(layer.weight[0].numel(), window, rule.needs == "gram", facts, False)


def _task(network: nn.Module, name: str, rule: Rule, want: Wanted, seed: int) -> Task:
    weight = network.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().float().reshape(len(weight), -1)
    shape = (matrix.shape[0], matrix.shape[1])
    kind = SITES[type(network.get_submodule(name))]
    site = Site(name, kind, f"{name}.weight", shape, 1, None, None)  # type: ignore[arg-type]
    shown = torch.cat(want.shown) if want.shown and (want.window is None or want.window.groups == 1) else None
    seen = torch.zeros(0, shape[1]) if shown is None else shown
    return Task(site, rule, formats.parse(rule.format), matrix, [want.known()], [seen], seed_of(seed, name))


def _grids(
    network: nn.Module, rules: dict[str, Rule], solved: dict[str, Solved], batches: list[Batch]
) -> dict[str, Fixed]:
    """Of static activations: fixed by what leaves the rewrite of each layer, on all batches."""
    waiting = [name for name, rule in rules.items() if rule.open_grid]
    if not waiting:
        return {}
    wanted = {}
    for name in waiting:
        columns = solved[name].record["shape"][1]
        wanted[name] = replace(Wanted(columns, None, False, False, True), rewrite=solved[name].rewrite)
    look(network, batches, wanted)
    return {name: _grid(rules[name]).observed(wanted[name].seen) for name in waiting}


def _grid(rule: Rule) -> Fixed:
    found = formats.parse(str(rule.activation))
    assert isinstance(found, Fixed)
    return found


@torch.no_grad()
def _correct(layer: nn.Module, item: Solved, mean: Tensor) -> None:
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = layer.weight.detach().float().reshape(len(layer.weight), -1)
    more = correction(weight, item.rewrite.unweight(item.qtensor.dequantize()), mean)
    bias = more if layer.bias is None else layer.bias.float() + more
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))


def _layer(layer: nn.Module, item: Solved, activation: str | None) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d.of(layer, item.qtensor, activation)
    assert isinstance(layer, nn.Linear)
    made = QuantLinear(T.describe(item.qtensor), layer.bias, activation, item.rewrite.kinds)
    made.fill(item.qtensor)
    for name, array in item.rewrite.arrays.items():
        getattr(made, f"input_{name}").copy_(array)
    return made.eval()
