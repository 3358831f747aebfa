# SPDX-License-Identifier: Apache-2.0
"""The manifest ``fewbit.json``: what a quantized folder is, in the field's own terms. Plain dict in, plain dict out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.containers.files import digest, member, named_files, read_json
from fewbit.errors import CorruptFileError, InputError

NAME = "fewbit.json"
FACTS = "facts.json"
"""What tells of the facts in a folder that `fewbit calibrate` wrote."""
NETWORK = "network"
"""The ``kind`` of a folder that :mod:`fewbit.network` wrote; language models have none."""
VERSION = 1
_REQUIRED = {
    "manifest": int,
    "version": str,
    "source": dict,
    "recipe": dict,
    "seed": int,
    "layers": list,
    "skipped": list,
    "files": dict,
    "bits_per_weight": (int, float),
    "size_bytes": int,
}


def read(folder: Path) -> dict[str, Any]:
    """The checked manifest of a quantized folder.

    Raises:
        InputError: there is none. CorruptFileError: fields are missing, of the wrong type, or of a newer version.
    """
    path = folder / NAME
    if not path.is_file():
        found = f"it holds no {NAME}" if folder.is_dir() else "there is no such folder"
        raise InputError(f"{folder}", found, "give a folder that `fewbit quantize` wrote")
    manifest = read_json(path)
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):  # type: ignore[arg-type]
            raise CorruptFileError(f"{path}", f"field {key!r} is missing or of the wrong type", "quantize again")
    if manifest["manifest"] > VERSION:
        raise CorruptFileError(
            f"{path}", f"manifest version {manifest['manifest']}", f"this fewbit reads up to {VERSION}"
        )
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Every file the manifest names is there and has the hash it had when written; every weight file is named.

    Raises:
        CorruptFileError: a file is missing, differs or is not named; the message names it.
    """
    for name, expected in manifest["files"].items():
        path = member(folder, name)
        if not path.is_file():
            raise CorruptFileError(f"{folder}", f"file {name} is missing", "copy the folder again, or quantize again")
        if digest(path) != expected:
            raise CorruptFileError(
                f"{path}", "its bytes differ from what was written", "copy it again, or quantize again"
            )
    for path in named_files(folder):
        if path.name not in manifest["files"]:
            raise CorruptFileError(f"{path}", "the manifest holds no hash of it", "copy the folder again")


def edited(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The files that people may change (templates, how to sample) and that are not as they were written, by name.

    Raises:
        CorruptFileError: a name leads out of the folder.
    """
    settings = manifest.get("settings", {})  # folders of earlier versions list none
    if not isinstance(settings, dict):
        raise CorruptFileError(f"{folder / NAME}", "field 'settings' is of the wrong type", "copy it again")
    paths = {name: member(folder, name) for name in settings}
    return [name for name, path in paths.items() if not path.is_file() or digest(path) != settings[name]]
