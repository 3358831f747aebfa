# SPDX-License-Identifier: Apache-2.0
"""Layers of the quantized path, computed as they will be when the model runs; and what that takes on another device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import kernels
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.rewrite import Chain, restore
from fewbit.core.terms import Term
from fewbit.formats.fixed import Fixed
from fewbit.kernels.reference import round_activations
from fewbit.model.stream import StreamedModel
from fewbit.run.solve import Solved

CPU = torch.device("cpu")


@contextmanager
def as_run(model: StreamedModel, solved: Iterable[Solved], device: torch.device = CPU) -> Iterator[None]:
    """While open, layers on ``device`` that hold the decoded weights of ``solved`` see their inputs rewritten, then
    rounded, unless their grid is yet to be fixed. Where integers are multiplied when the model runs, they are here, by
    the same kernel: its very numbers, in less time than rounding and a product of floats take."""
    with ExitStack() as stack:
        for item in solved:
            if item.activation is None and not item.rewrite.steps:
                continue  # experts, who are no modules of their own, have neither
            layer = model.module.get_submodule(item.record["name"])
            rewriting = item.rewriting if device == CPU else kernels.Rewriting(_rewrite(item, device))
            if _on_cpu(layer) and (integers := item.integers) is not None:
                stack.enter_context(_forward(layer, partial(_multiplied, layer, rewriting, integers)))
            else:
                stack.enter_context(layer.register_forward_pre_hook(_inputs(rewriting, item.activation)))
        yield


@contextmanager
def _forward(layer: nn.Module, made: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, ``made`` is what ``layer`` computes; its hooks are called as ever."""
    layer.forward = made
    try:
        yield
    finally:
        del layer.forward


def _on_cpu(layer: nn.Module) -> bool:
    return all(value.is_cpu for value in layer.parameters(recurse=False))


def _multiplied(layer: nn.Module, rewriting: kernels.Rewriting, integers: kernels.Prepared, x: Tensor) -> Tensor:
    """What ``layer`` makes of ``x``, in the dtype that a product of floats would have here."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    narrow = torch.is_autocast_enabled("cpu")
    return integers(rewriting(x), bias).to(torch.get_autocast_dtype("cpu") if narrow else x.dtype)


def _inputs(rewriting: kernels.Rewriting, activation: Format | None) -> Any:
    if isinstance(activation, Fixed) and not activation.bound:
        activation = None  # calibration is about to look at what is then rounded

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_activations(rewriting(arguments[0]), activation), *arguments[1:])

    return hook


def straight_through(item: Solved, device: torch.device) -> Any:
    """A pre-hook that rewrites and rounds inputs on ``device`` as :func:`as_run` does, gradients going straight through
    the rounding."""
    rewrite, activation = _rewrite(item, device), item.activation

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = rewrite.apply(arguments[0]) if rewrite.steps else arguments[0]
        if activation is not None:
            x = x + (round_activations(x.detach(), activation) - x.detach())
        return (x, *arguments[1:])

    return hook


def _rewrite(item: Solved, device: torch.device) -> Chain:
    kinds, columns = [step.kind for step in item.rewrite.steps], item.record["shape"][1]
    return restore(kinds, columns, placed(item.rewrite.arrays, device))


@contextmanager
def lying_on(device: torch.device, module: nn.Module) -> Iterator[None]:
    """While open, ``module`` is on ``device``."""
    module.to(device)
    try:
        yield
    finally:
        module.to(CPU)


def placed(tree: Any, device: torch.device) -> Any:
    """``tree`` with its tensors on ``device``."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, (tuple, list)):
        return type(tree)(placed(entry, device) for entry in tree)
    if isinstance(tree, dict):
        return {key: placed(entry, device) for key, entry in tree.items()}
    if isinstance(tree, (QTensor, Term)):
        held: Any = tree  # every term is a dataclass
        return replace(held, **{one.name: placed(getattr(held, one.name), device) for one in fields(held)})
    return tree
