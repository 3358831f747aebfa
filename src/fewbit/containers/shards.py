# SPDX-License-Identifier: Apache-2.0
"""The weights of a Hugging Face folder: one safetensors file, or several and an index."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fewbit.containers.files import INDEX, LARGEST_SIDECAR, member, read_json
from fewbit.containers.safetensors import SafetensorsFile, open_safetensors
from fewbit.errors import CorruptFileError, InputError, UnsupportedError

SINGLE = "model.safetensors"
MASKS = ("bias", "mask")
"""How the names end of causal masks that older checkpoints hold as bytes (``attn.bias`` of GPT-Neo and GPT-J)."""


def weight_files(folder: Path) -> list[SafetensorsFile]:
    """The checked weight files of ``folder``, each of its tensors in exactly one of them.

    Raises:
        InputError: no safetensors, or a shard is missing.
        CorruptFileError: the index contradicts the files or leads out of the folder.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder, folder / INDEX)
    if (folder / SINGLE).is_file():
        return [open_safetensors(member(folder, SINGLE))]
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise UnsupportedError(
            f"opening the model {folder}",
            f"its weights are pickle ({pickles[0]}), which can run code and is never read",
            "safetensors: model.save_pretrained(folder, safe_serialization=True)",
        )
    ggufs = [name for name in present if name.endswith(".gguf")]
    works = f"name the file: {folder / ggufs[0]}" if ggufs else f"{SINGLE}, or {INDEX} and its shards"
    raise InputError(f"opening the model {folder}", f"no {SINGLE} among {', '.join(present[:8])}", works)


def _sharded(folder: Path, index: Path) -> list[SafetensorsFile]:
    places = read_json(index, LARGEST_SIDECAR).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CorruptFileError(f"reading {index}", "its weight_map does not map tensors to file names")
    paths = {name: member(folder, name) for name in sorted(set(places.values()))}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise InputError(
            f"opening the model {folder}",
            f"{len(absent)} of {len(paths)} files are missing: {', '.join(absent[:5])}",
            "all the files that the index names; is the download complete?",
        )
    shards = [open_safetensors(path) for path in paths.values()]
    for name, shard in zip(paths, shards, strict=True):
        strays = [key for key in shard.entries if places.get(key) != name]
        if strays:
            where = places.get(strays[0])
            found = f"which its index {f'puts in {where}' if where else 'does not name'}"
            raise CorruptFileError(f"opening the model {folder}", f"{name} holds the tensor {strays[0]}, {found}")
    held = {key for shard in shards for key in shard.entries}
    lost = [key for key in places if key not in held]
    if lost:
        raise CorruptFileError(
            f"opening the model {folder}", f"no file holds {len(lost)} tensors of its index: {lost[0]}"
        )
    return shards


def refuse_scaled(folder: Path, files: Iterable[SafetensorsFile]) -> None:
    """Refuse weights that another tool quantized though ``config.json`` does not say so: without their scales, for
    which a model has no place, they are other weights.

    Raises:
        UnsupportedError: a weight holds integers, or floats of 8 bits that a tensor beside it scales; it is named.
    """
    held = {key: entry for file in files for key, entry in file.entries.items()}
    asked, works = f"opening the model {folder}", "the original weights"
    for key, entry in held.items():
        dtype, matrix = entry.dtype, len(entry.shape) >= 2
        small = matrix and dtype in (torch.int8, torch.uint8) and not key.endswith(MASKS)
        packed = key.endswith("weight") or small
        if packed and not (dtype.is_floating_point or dtype.is_complex):
            raise UnsupportedError(asked, f"{key} holds integers, as quantized weights do", works)
        beside = (name for name in (f"{key}_scale", f"{key}_scale_inv") if name in held)
        if dtype.itemsize == 1 and (scale := next(beside, None)) is not None:
            raise UnsupportedError(asked, f"{key} holds floats of 8 bits that {scale} scales", works)
