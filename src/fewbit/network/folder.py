# SPDX-License-Identifier: Apache-2.0
"""A quantized network on disk: ``model.safetensors`` with the packed bits, and the manifest ``fewbit.json``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbit
from fewbit.containers import manifest as M
from fewbit.containers import terms as T
from fewbit.containers.files import refuse_folder, take_place, write_json
from fewbit.containers.safetensors import open_safetensors, write_safetensors
from fewbit.core import given
from fewbit.errors import InputError, VerificationError
from fewbit.model.convolution import QuantConv2d, margin_of, placed_windows, window_of
from fewbit.model.layers import QuantLinear
from fewbit.model.product import Product, QuantProduct
from fewbit.network.fold import unfolded
from fewbit.network.inline import place, placed
from fewbit.network.places import put, state_of, without_shortcuts
from fewbit.network.quantized import Quantized

FILE = "model.safetensors"


def save(quantized: Quantized, folder: str | Path, force: bool = False) -> dict[str, Any]:
    """Write ``folder`` and read it back; returns the manifest.

    Raises:
        InputError: the folder exists and ``force`` is off.
        VerificationError: what was written does not read back as what is held.
    """
    _check(quantized)
    target = given.place("folder", folder)
    refuse_folder(target, force, M.NAME)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_of(quantized.network).items()}
    sha256 = write_safetensors(partial / FILE, tensors, {"format": "pt"})
    manifest = {
        "manifest": M.VERSION,
        "kind": M.NETWORK,
        "version": fewbit.__version__,
        "source": {"architecture": type(quantized.network).__name__},
        "recipe": quantized.recipe.to_dict(),
        "seed": quantized.seed,
        "calibration_batches": quantized.batches,
        "sequential": quantized.sequential,
        "loss": quantized.loss,
        "folded": quantized.folded,
        "inline": placed(quantized.network),
        "layers": [{k: v for k, v in record.items() if k != "seconds"} for record in quantized.layers],
        "products": quantized.products,
        "skipped": quantized.skipped,
        "bits_per_weight": quantized.bits_per_weight,
        "size_bytes": (partial / FILE).stat().st_size,
        "files": {FILE: sha256},
    }
    file = open_safetensors(partial / FILE)
    for name, tensor in tensors.items():
        found = file.get(name)
        if not torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (found, tensor))):
            raise VerificationError(f"{name} in {partial / FILE}", "it reads back as other values than were written")
    write_json(partial / M.NAME, manifest)
    take_place(partial, target)
    return manifest


def load(folder: str | Path, network: nn.Module, check: bool = True) -> nn.Module:
    """Put what ``folder`` holds into ``network``, an instance of the class that was quantized, whatever its weights.

    Args:
        check: compare the file with the hash in the manifest first.

    Returns:
        ``network``, changed, in evaluation mode.

    Raises:
        InputError: no such folder, or the network is of another structure; the message names what differs.
        CorruptFileError: the file or the manifest is not what was written.
    """
    path = Path(folder)
    manifest = M.read(path)
    if manifest.get("kind") != M.NETWORK:
        raise InputError(f"{path} as a network", "it holds a language model", "fewbit.load reads it")
    if check:
        M.check_files(path, manifest)
    file = open_safetensors(path / FILE)
    try:
        without_shortcuts(network)
        unfolded(network, manifest["folded"])
        for record in manifest["layers"]:
            _replace(network, record)
        for name, calls in manifest.get("inline", {}).items():
            place(network, name, calls)
        for record in manifest.get("products", []):
            if type(network.get_submodule(record["name"])) is not Product:
                raise AttributeError(f"{record['name']} is no product")
            put(network, record["name"], QuantProduct(record["left"], record["right"]))
    except (AttributeError, AssertionError, KeyError, TypeError) as error:
        found = f"it does not have the layers that were quantized ({error})"
        raise InputError(f"{path} into a {type(network).__name__}", found, "an instance of the same class") from None
    stored = {name: file.get(name) for name in file.entries}
    own = state_of(network)
    for name in stored.keys() | own.keys():
        if name not in stored or name not in own or stored[name].shape != own[name].shape:
            ours = tuple(own[name].shape) if name in own else "missing"
            theirs = tuple(stored[name].shape) if name in stored else "missing"
            found = f"{name} is {theirs} in the file and {ours} in the network"
            raise InputError(f"{path} into a {type(network).__name__}", found, "an instance of the same class")
    for record in manifest["layers"]:
        network.get_submodule(record["name"]).to_empty(device="cpu")
    network.load_state_dict(stored, strict=False)  # but for other names of the same modules, which are not stored
    return network.eval()


def _check(quantized: object) -> None:
    if not isinstance(quantized, Quantized):
        found = f"it is a {type(quantized).__name__}, which does not say how it was made"
        raise InputError("saving a quantized network", found, "what fewbit.network.quantize returned")


def _replace(network: nn.Module, record: dict[str, Any]) -> None:
    old = network.get_submodule(record["name"])
    shape = tuple(record["shape"])
    if not isinstance(old, (nn.Conv2d, nn.Linear)) or shape != (len(old.weight), old.weight[0].numel()):
        raise AttributeError(f"{record['name']} is {old}")
    window = record.get("window")  # of older folders, none
    if isinstance(old, nn.Conv2d) and window is not None and placed_windows(old) != _placed(record):
        raise AttributeError(f"{record['name']} is {old}, and was {window}")
    plain, activation = T.of_entry(record), record["activation"]
    bias = nn.Parameter(torch.zeros(shape[0], dtype=old.weight.dtype)) if record["bias"] else None
    if isinstance(old, nn.Conv2d):
        new: nn.Module = QuantConv2d(
            plain, window_of(old), bias, activation, dtype=old.weight.dtype, margin=margin_of(old)
        )
    else:
        kinds = [step["kind"] for step in record["rewrites"]]
        new = QuantLinear(plain, bias, activation, kinds, dtype=old.weight.dtype)
    # names and sizes alone: what the arrays of a sum hold is checked whenever they are read
    put(network, record["name"], new.to("meta"))


def _placed(record: dict[str, Any]) -> dict[str, Any]:
    """As :func:`fewbit.model.convolution.placed_windows` gives it, before it became JSON."""
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in record[name].items()}
        for name in ("window", "margin")
        if name in record
    }
