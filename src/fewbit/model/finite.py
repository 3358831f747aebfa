# SPDX-License-Identifier: Apache-2.0
"""Activations that are no numbers, refused by the name of the layer where they begin."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fewbit.core.sums import all_finite
from fewbit.errors import InputError


class _Begins(Exception):
    """Raised inside a module at the first layer that sees, or makes, what is no number."""

    def __init__(self, path: str, what: str, values: Tensor) -> None:
        super().__init__()
        bad = int((~values.isfinite()).sum())
        self.path, self.found = path, f"{bad} of {values.numel()} of its {what} are NaN or infinite"


def finite(values: Tensor, path: str, module: nn.Module, run: Callable[[nn.Module], Any]) -> Tensor:
    """``values``, which ``run(module)`` made of finite inputs; ``path`` is the module's.

    Raises:
        InputError: they hold NaN or infinity. To name the first layer, in order of execution, ``run`` is called again,
            on a twin of ``module`` that looks at what enters and leaves each layer.
    """
    if all_finite(values):
        return values
    check_layers(module, path, run)
    raise _refused(_Begins(path or "the model", "outputs", values))  # two finite numbers whose sum is none


def check_layers(module: nn.Module, path: str, run: Callable[[nn.Module], Any]) -> None:
    """Raises InputError, of the first layer that sees or makes NaN or infinity in ``run(module)``; see
    :func:`finite`."""
    try:
        run(_watched(module, path))
    except _Begins as begins:
        raise _refused(begins) from None


def check_inputs(values: Tensor, path: str) -> None:
    """Raises InputError: ``values``, the inputs of the layer at ``path``, hold NaN or infinity."""
    if not all_finite(values):
        raise _refused(_Begins(path, "inputs", values))


def _refused(begins: _Begins) -> InputError:
    works = "check that the model runs in float on such inputs: a layer before may make numbers too large for float32"
    return InputError(f"activations of {begins.path}", begins.found, works)


def _watched(module: nn.Module, path: str) -> nn.Module:
    """A twin of ``module`` that shares its parameters, and raises :class:`_Begins`. Hooks of ``module`` run as well."""
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else _watched(child, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    if any(value is not None for value in module._parameters.values()):
        looks: list[Callable[..., None]] = [
            lambda _, arguments: _look(path, "inputs", arguments),
            lambda _, arguments, made: _look(path, "outputs", made),
        ]
        twin._forward_pre_hooks = OrderedDict({-1: looks[0], **module._forward_pre_hooks})
        twin._forward_hooks = OrderedDict({**module._forward_hooks, -1: looks[1]})
    return twin


def _look(path: str, what: str, values: Any) -> None:
    for each in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(each, Tensor) and each.is_floating_point() and not all_finite(each):
            raise _Begins(path, what, each)
