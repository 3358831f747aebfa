# SPDX-License-Identifier: Apache-2.0
"""Nothing is called done before it was read again from disk and found to be what was computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.containers import manifest as M
from fewbit.containers import terms as T
from fewbit.containers.files import INDEX, member, read_json
from fewbit.containers.safetensors import SafetensorsFile, open_safetensors
from fewbit.core import rewrite as R
from fewbit.errors import CorruptFileError, InputError, VerificationError
from fewbit.run.solve import digest


def read_back(file: SafetensorsFile | Path, record: dict[str, Any]) -> T.Weight:
    """The layer of ``record`` as ``file``, opened or to be opened, holds it.

    Raises:
        VerificationError: arrays are missing, of another shape or dtype, not finite, or decode to other values than
            those that were solved.
    """
    file = opened(file)
    weight = _weight(file, record)
    if digest(weight.dequantize()) != record["decoded_sha256"]:
        raise _other_values(file, record)
    return weight


def read_first(file: SafetensorsFile, record: dict[str, Any], solved: Tensor) -> tuple[T.Weight, str]:
    """:func:`read_back` of a layer that was just written, ``solved`` being its decoded values in any shape; and the
    hash by which it is known from then on."""
    weight = _weight(file, record)
    decoded = weight.dequantize()
    if not torch.equal(decoded, solved.reshape(decoded.shape)):
        raise _other_values(file, record)
    return weight, digest(decoded)


def _weight(file: SafetensorsFile, record: dict[str, Any]) -> T.Weight:
    """The layer of ``record`` as it lies in ``file``; what is refused of its arrays: see :func:`read_back`."""
    name, (rows, columns) = record["name"], record["shape"]
    plain = T.of_entry({**record, "shape": [rows * record["experts"], columns]})
    try:
        return T.restore(plain, _arrays(file, f"{name}.weight_", T.sizes(plain)))
    except CorruptFileError as error:
        raise VerificationError(f"layer {name} in {file.path.name}: {error.asked}", error.found) from None


def _other_values(file: SafetensorsFile, record: dict[str, Any]) -> VerificationError:
    found = "it decodes to other values than those that were solved"
    return VerificationError(f"layer {record['name']} in {file.path.name}", found)


def read_rewrite(file: SafetensorsFile | Path, record: dict[str, Any]) -> R.Chain:
    """What the layer of ``record`` does to its inputs, as ``file``, opened or to be opened, holds it.

    Raises:
        VerificationError: arrays are missing, of another shape or dtype, not finite, or not those that were fitted.
    """
    if not record["rewrites"]:
        return R.Chain()
    file = opened(file)
    kinds, columns = _kinds(record), record["shape"][1]
    arrays = _arrays(file, f"{record['name']}.input_", R.storage(kinds, columns))
    for position, step in enumerate(record["rewrites"]):
        for array, expected in step["arrays"].items():
            if digest(arrays[f"{position}_{array}"]) != expected:
                key = f"{record['name']}.input_{position}_{array}"
                raise VerificationError(
                    f"{key} in {file.path.name}", "it holds other values than those that were fitted"
                )
    try:
        return R.restore(kinds, columns, arrays)
    except InputError as error:
        raise VerificationError(f"inputs of {record['name']} in {file.path.name}: {error.asked}", error.found) from None


def _kinds(record: dict[str, Any]) -> list[str]:
    return [step["kind"] for step in record["rewrites"]]


def opened(file: SafetensorsFile | Path) -> SafetensorsFile:
    """``file``, its header checked: once for all that is read of it."""
    return open_safetensors(file) if isinstance(file, Path) else file


def _arrays(file: SafetensorsFile, stem: str, sizes: R.Sizes) -> dict[str, Tensor]:
    """The arrays of ``sizes``, each called ``stem`` and its own name in ``file``; see above for what is refused."""
    found = {}
    for array, (dtype, size) in sizes.items():
        key = stem + array
        if key not in file.entries:
            raise VerificationError(f"reading {file.path.name} again", f"{key} is missing")
        tensor = file.get(key)
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise VerificationError(f"{key} must be {dtype} {size}", f"it is {tensor.dtype} {tuple(tensor.shape)}")
        _finite(key, tensor)
        found[array] = tensor
    return found


def verify_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """The finished folder: hashes, kept tensors finite, nothing missing or left over.

    Layers are not decoded once more: each was, from the disk, when its shard was written, and the shard's bytes still
    have the hash of then.

    Raises:
        VerificationError, CorruptFileError: what is wrong, by name.
    """
    M.check_files(folder, manifest)
    index = read_json(folder / INDEX)["weight_map"]
    files = {name: open_safetensors(member(folder, name)) for name in sorted(set(index.values()))}
    stored = {key: name for name, file in files.items() for key in file.entries}
    if stored != index:
        differing = sorted(set(stored.items()) ^ set(index.items()))
        raise VerificationError(f"{folder / INDEX}", f"it and the shards disagree on {differing[0][0]}")
    accounted = set()
    for record in manifest["layers"]:
        stem = f"{record['name']}.weight_"
        held = {f"{stem}{array}" for array in T.sizes(T.of_entry(record))}
        if not held <= stored.keys():
            raise VerificationError(f"layer {record['name']}", "no shard holds it")
        accounted |= held
        accounted |= {f"{record['name']}.input_{array}" for array in R.storage(_kinds(record), record["shape"][1])}
    for key in stored.keys() - accounted:
        _finite(key, files[stored[key]].get(key))
    listed = {entry["name"] for entry in manifest["skipped"] if not entry.get("tied_to")}
    if left := (stored.keys() - accounted) ^ listed:
        raise VerificationError(f"{folder}", f"tensors listed and stored differ: {', '.join(sorted(left)[:5])}")


def _finite(key: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    ends = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()  # NaN where one is
    if not (math.isfinite(ends.min) and math.isfinite(ends.max)):
        raise VerificationError(f"tensor {key}", "it holds NaN or Inf")
