# SPDX-License-Identifier: Apache-2.0
"""Where a network's own code multiplies by the weight of a layer, without calling the layer, the layer is called.

``F.linear(x, self.qkv.weight, self.qkv.bias)`` runs no hook of ``qkv``, and hooks are how inputs are observed, rounded
and weighed. While :class:`AsLayers` is open, such a call is the layer's. (A quantized layer needs none of it: its
:class:`~fewbit.model.float_weight.FloatWeight` knows whose it is.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fewbit.errors import UnsupportedError
from fewbit.model.convolution import margin_of, window, window_of
from fewbit.model.float_weight import arguments
from fewbit.model.hooks import hooked

FUNCTIONS: dict[Any, type[nn.Module]] = {nn.functional.linear: nn.Linear, torch.conv2d: nn.Conv2d}
"""What multiplies by a weight, and the layers whose it may be."""


class AsLayers(TorchFunctionMode):
    """While open, on one run of ``network``. ``other_bias``: names of layers that were called so with another bias
    than their own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._names = {m: name for name, m in network.named_modules() if type(m) in FUNCTIONS.values()}
        self._of: dict[int, list[nn.Module]] = {}
        for layer in self._names:
            self._of.setdefault(id(layer.weight), []).append(layer)
        self._running: list[nn.Module] = []
        self.other_bias: set[str] = set()

    @contextmanager
    def open(self) -> Iterator[None]:
        with hooked(self._watch()), self:
            yield

    def _watch(self) -> Iterator[RemovableHandle]:
        """A layer that runs multiplies by its weight itself."""

        def before(layer: nn.Module, args: Any) -> None:
            self._running.append(layer)

        def after(layer: nn.Module, args: Any, made: Any) -> None:
            self._running.remove(layer)

        for layer in self._names:
            yield layer.register_forward_pre_hook(before, prepend=True)
            yield layer.register_forward_hook(after, prepend=True, always_call=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS or self._running:
            return func(*args, **kwargs)
        x, weight, bias, rest, named = arguments(*args, **kwargs)
        asked = [layer for layer in self._of.get(id(weight), ()) if _alike(layer, func, rest, named)]
        if len(asked) > 1:
            asked = [layer for layer in asked if layer.bias is bias] or asked
        if not asked:
            return func(*args, **kwargs)
        if len(asked) > 1:
            names = " and ".join(self._names[layer] for layer in asked)
            found = "they share a weight, and the network's own code multiplies by it without calling either"
            raise UnsupportedError(f"telling {names} apart", found, "code that calls the layer, or one layer")
        return self._called(asked[0], x, bias)

    def _called(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        own = layer._parameters["bias"]
        if bias is not own:
            self.other_bias.add(self._names[layer])
        layer._parameters["bias"] = bias  # type: ignore[assignment]
        try:
            made: Tensor = layer(x)
        finally:
            layer._parameters["bias"] = own
        return made.view_as(made)  # not what the layer returned: no norm is folded into a layer that is not called


def _alike(layer: nn.Module, func: Any, rest: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether ``func`` does what ``layer`` would."""
    if type(layer) is not FUNCTIONS[func]:
        return False
    if not isinstance(layer, nn.Conv2d):
        return True
    if margin_of(layer) is not None:
        return False
    try:
        return window(layer.kernel_size, *rest, **named) == window_of(layer)
    except UnsupportedError:
        return False
