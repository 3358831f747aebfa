# SPDX-License-Identifier: Apache-2.0
"""Batch norms folded into the layers before them (Jacob et al. 2018, arXiv:1712.05877, section 3.2).

In evaluation, ``y = gamma (W x + b - mean) / sqrt(var + eps) + beta`` is ``y = W' x + b'`` with ``W' = W gamma /
sqrt(var + eps)`` row by row. Which norm follows which layer is seen while the network runs, so any way of writing
``forward`` will do; that nothing else looks at the layer's own output is checked by the network's output, which must
not move.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import InputError, UnsupportedError
from fewbit.model.finite import check_layers
from fewbit.model.hooks import hooked
from fewbit.network.feeding import Batch, feed

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Conv2d, nn.Linear)
MOVED = 1e-9
"""Of the largest output, in float64: more than rounding explains in any network, less than any mistake."""


def fold_norms(network: nn.Module, batch: Batch) -> dict[str, str]:
    """Fold, in place, every batch norm that runs on the untouched output of a convolution or linear layer.

    Args:
        network: in evaluation mode.
        batch: of its inputs; it is run on it.

    Returns:
        norm -> layer, by name. A folded norm is an identity, and the layer has a bias.

    Raises:
        InputError: activations hold NaN or infinity; the message names the first layer that has them.
        UnsupportedError: the output moved: something besides the norm uses the output of a layer before one; or the
            network does not run in float64. It is then as it was.
    """
    pairs = _pairs(network, batch)
    if not pairs:
        return {}
    exact = copy.deepcopy(network).double()
    try:
        before = feed(exact, batch)
    except InputError as error:  # it casts to another dtype, as x.float() does: in its own it has run
        found = f"that is checked in float64, in which the network does not run: {error.found}"
        raise UnsupportedError(f"folding {len(pairs)} batch norms", found, "fold=False") from error
    for norm, layer in pairs.items():
        _fold(exact, norm, layer)
    moved = distance(feed(exact, batch), before)
    if not moved <= MOVED:
        check_layers(exact, "", lambda network: feed(network, batch))
        found = f"the output moved by {moved:.3g} of its largest value: a layer's output is used beside its norm"
        raise UnsupportedError(f"folding {len(pairs)} batch norms", found, "fold=False")
    for norm, layer in pairs.items():
        _fold(network, norm, layer)
    return pairs


def unfolded(network: nn.Module, pairs: dict[str, str]) -> None:
    """Give ``network``, as its class builds it, the shape that folding leaves: norms gone, biases there, values not."""
    for norm, layer in pairs.items():
        module = network.get_submodule(layer)
        assert isinstance(module, LAYERS)
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(len(module.weight), dtype=module.weight.dtype))
        network.set_submodule(norm, nn.Identity())


def distance(found: Any, expected: Any) -> float:
    """Largest difference of two outputs of one structure, over the largest entry of ``expected``."""
    ours, theirs = tensors(found), tensors(expected)
    most = max((float(tensor.abs().max()) for tensor in theirs if tensor.numel()), default=0.0)
    pairs = zip(ours, theirs, strict=True)
    apart = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    return apart / most if most else apart


def tensors(output: Any) -> list[Tensor]:
    """The float tensors in an output: itself, or in a tuple, list or mapping, nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict) or hasattr(output, "items"):
        output = [value for _, value in output.items()]
    return [found for part in output for found in tensors(part)] if isinstance(output, (list, tuple)) else []


def _pairs(network: nn.Module, batch: Batch) -> dict[str, str]:
    """norm -> layer, where the norm's input is the very tensor that the layer returned, and both run once."""
    made: list[tuple[Tensor, str]] = []  # kept alive, so that no other tensor takes the place of one
    pairs: dict[str, str] = {}
    runs: dict[str, int] = {}

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            made.append((output, name))

        return hook

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            runs[name] = runs.get(name, 0) + 1
            for output, layer in reversed(made):
                if args[0] is output:
                    if output.dim() in (2, 4):  # else the channels of a linear layer are not those of the norm
                        pairs[name] = layer
                    return

        return hook

    named = list(network.named_modules())
    leaving = (module.register_forward_hook(after(name)) for name, module in named if isinstance(module, LAYERS))
    entering = (
        module.register_forward_pre_hook(before(name))
        for name, module in named
        if isinstance(module, NORMS) and module.running_mean is not None
    )
    with hooked(leaving), hooked(entering):
        feed(network, batch)
    return {norm: layer for norm, layer in pairs.items() if runs[norm] == runs[layer] == 1}


@torch.no_grad()
def _fold(network: nn.Module, name: str, before: str) -> None:
    norm, layer = network.get_submodule(name), network.get_submodule(before)
    assert isinstance(norm, NORMS) and isinstance(layer, LAYERS)
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    if layer.bias is not None:
        shift = shift + layer.bias.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = layer.weight.dtype
    layer.weight.copy_(layer.weight.double() * gain.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias = nn.Parameter(shift.to(dtype))
    network.set_submodule(name, nn.Identity())
