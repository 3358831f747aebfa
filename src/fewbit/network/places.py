# SPDX-License-Identifier: Apache-2.0
"""Modules of a network, wherever they are in it: one that is called from several places has several names."""

from __future__ import annotations

from torch import Tensor, nn

from fewbit.model.layers import Multiplier


def put(network: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module ``name`` by ``new``, under every name that it has."""
    old = network.get_submodule(name)
    if isinstance(new, Multiplier):
        new.name = name
    for path in [path for path, module in network.named_modules(remove_duplicate=False) if module is old]:
        network.set_submodule(path, new)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of ``network`` by name, those of a module with several names once."""
    first = {path for path, _ in network.named_modules()}
    return {name: tensor for name, tensor in network.state_dict().items() if name.rpartition(".")[0] in first}


def without_shortcuts(network: nn.Module) -> nn.Module:
    """``network``, changed: torch's own encoder layers hand the float weights of their linear layers to one function
    where these flags allow it, and stacks of them drop padded positions; without, they call the layers."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return network
