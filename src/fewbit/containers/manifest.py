# SPDX-License-Identifier: Apache-2.0
"""The manifest ``fewbit.json``: what a quantized folder is, in the field's own terms. Plain dict in, plain dict out."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fewbit.errors import CorruptFileError, InputError

NAME = "fewbit.json"
VERSION = 1
_LARGEST = 256 * 2**20
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


def write_json(path: Path, value: Any) -> None:
    """Write atomically: temporary name in the same folder, flushed to disk, renamed.

    Raises:
        InputError: the disk is full or the folder is not writable; nothing is left behind.
    """
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Like :func:`write_json`, for bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"writing {path}", f"{error.strerror} ({len(content)} bytes needed)") from None


def read_json(path: Path) -> Any:
    """A JSON file of bounded size.

    Raises:
        InputError: missing or unreadable. CorruptFileError: not JSON, or absurdly large.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise CorruptFileError(f"{path}", f"{path.stat().st_size} bytes", f"at most {_LARGEST} are read")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}", "it does not exist") from None
    except OSError as error:
        raise InputError(f"{path}", f"it cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}", f"it is not JSON ({error})") from None


def read(folder: Path) -> dict[str, Any]:
    """The checked manifest of a quantized folder.

    Raises:
        InputError: there is none. CorruptFileError: fields are missing, of the wrong type, or of a newer version.
    """
    path = folder / NAME
    if not path.is_file():
        raise InputError(f"{folder}", f"it holds no {NAME}", "give a folder that `fewbit quantize` wrote")
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise CorruptFileError(f"{path}", "it is not an object")
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):  # type: ignore[arg-type]
            raise CorruptFileError(f"{path}", f"field {key!r} is missing or of the wrong type", "quantize again")
    if manifest["manifest"] > VERSION:
        raise CorruptFileError(f"{path}", f"manifest version {manifest['manifest']}", f"this fewbit reads up to {VERSION}")
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Every file the manifest names is there and has the hash it had when written.

    Raises:
        CorruptFileError: a file is missing or differs; the message names it.
    """
    for name, expected in manifest["files"].items():
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise CorruptFileError(f"{folder / NAME}", f"file name {name!r} leaves the folder")
        path = folder / name
        if not path.is_file():
            raise CorruptFileError(f"{folder}", f"file {name} is missing", "copy the folder again, or quantize again")
        if file_sha256(path) != expected:
            raise CorruptFileError(f"{path}", "its bytes differ from what was written", "copy it again, or quantize again")
