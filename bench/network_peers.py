# SPDX-License-Identifier: Apache-2.0
"""Other packages' weights in few bits, in networks of convolutions and linear layers: what they decode to, in a float
copy, and at which true bits. For ``bench/networks.py --peer NAME``, with the package on PYTHONPATH."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from quantizer_sides import Found, of_quanto


def layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))


def quanto(network: nn.Module, bits: int) -> Found:
    """By the largest magnitude (8 bits) or ends, of rows or groups of 128, as ``quantize`` does unasked."""
    import optimum.quanto as Q

    Q.quantize(network, weights=getattr(Q, f"qint{bits}"))
    Q.freeze(network)
    return of_quanto(dict(layers(network)), bits)


def coremltools(network: nn.Module, bits: int) -> Found:
    """A palette a layer, by k-means."""
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    table = {"n_bits": bits, "granularity": "per_tensor"}
    config = PostTrainingPalettizerConfig.from_dict({"module_type_configs": {nn.Conv2d: table, nn.Linear: table}})
    made = PostTrainingPalettizer(network, config).compress(inplace=True)
    found = {name: layer.weight.detach() for name, layer in layers(made)}
    if any(len(weight.unique()) > 2**bits for weight in found.values()):
        raise ValueError("some layers are as they were")
    return found, bits * sum(weight.numel() for weight in found.values()) + 16 * 2**bits * len(found)


PEERS: dict[str, tuple[Callable[[nn.Module, int], Found], tuple[int, ...]]] = {
    "quanto": (quanto, (8, 4, 2)),
    "coremltools": (coremltools, (8, 4, 3, 2)),
}
"""By package: what makes the weights, and the bits that it knows."""


def rows(network: nn.Module, names: list[str]) -> Iterator[tuple[str, float, nn.Module]]:
    """Name, true bits of the quantized weights, and a float network with what they decode to."""
    for name in names:
        make, sizes = PEERS[name]
        for bits in sizes:
            found, taken = make(copy.deepcopy(network), bits)
            made = copy.deepcopy(network)
            with torch.no_grad():
                for layer, weight in found.items():
                    made.get_submodule(layer).weight.copy_(weight.reshape(made.get_submodule(layer).weight.shape))
            yield f"{name}, {bits} bits", taken / sum(weight.numel() for weight in found.values()), made
