# SPDX-License-Identifier: Apache-2.0
"""Files that may be hostile, and files that must not be half written. Every reader and writer goes through here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from fewbit.errors import CorruptFileError, InputError

LARGEST_JSON = 64 << 20
LARGEST_SIDECAR = 1 << 28
"""Bytes. The largest real ones (tokenizers with 260,000 entries) stay below 40 MB."""
CHUNK = 1 << 22
INDEX = "model.safetensors.index.json"


def size_of(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        InputError: it is absent, unreadable or not a regular file.
    """
    try:
        if not path.is_file():
            raise InputError(f"reading {path}", "there is no such file" if not path.exists() else "it is not a file")
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"reading {path}", str(error)) from error


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` that refuses a key given twice: two readers would disagree on which one counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} appears twice")
        found[key] = value
    return found


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from ``data``; ``name`` is what errors call it.

    Raises:
        CorruptFileError: not UTF-8, not JSON, a key twice, nested too deeply, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"reading {name} as JSON", str(error) or type(error).__name__) from error
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"reading {name}", f"it holds a JSON {type(value).__name__}", "a JSON object is expected"
        )
    return value


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """The JSON object in ``path``, at most ``largest`` bytes long."""
    size = size_of(path)
    if size > largest:
        raise CorruptFileError(f"reading {path}", f"it has {size} bytes", f"at most {largest} are read")
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"reading {path}", str(error)) from error


def member(folder: Path, name: str) -> Path:
    """The path of ``name``, a file name that came out of a file, inside ``folder``.

    Refused: separators, ``..``, absolute names, and links that lead out of the folder. The one exception is the Hugging
    Face cache, whose ``snapshots/REVISION/`` holds links into the ``blobs/`` beside ``snapshots/``.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0", ":")):
        raise CorruptFileError(f"the file name {name!r} given inside {folder}", "it leaves the folder", "a plain name")
    path = folder / name
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CorruptFileError(f"the file name {name!r} given inside {folder}", str(error)) from error
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if target.parent not in allowed:
        raise CorruptFileError(
            f"the file {path}", f"it is a link to {target}, outside the folder", "copy the file there"
        )
    return path


def named_files(folder: Path) -> list[Path]:
    """The safetensors files of ``folder``, unopened: those that its index names, else all.

    Raises:
        CorruptFileError: the index leads out of the folder.
    """
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    places = read_json(folder / INDEX).get("weight_map")
    names = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    return [member(folder, name) for name in sorted(names)]


def digest(*paths: Path) -> str:
    """Hex sha256 of the files' bytes, one after the other, streamed."""
    state = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as stream:
                while block := stream.read(CHUNK):
                    state.update(block)
        except OSError as error:
            raise InputError(f"reading {path}", str(error)) from error
    return state.hexdigest()


class Hashing:
    """A binary stream that hashes what passes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.state = stream, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.state.update(data)
        self.stream.write(data)


def refuse_existing(target: Path, force: bool) -> None:
    """Raise InputError where ``target``, a file to be written, exists and ``force`` is off, or is a folder."""
    if target.is_dir():
        raise InputError(f"writing {target}", "it is a folder", "the name of a file")
    if target.exists() and not force:
        raise InputError(f"writing {target}", "it exists already", REPLACING)


def refuse_folder(target: Path, force: bool, mark: str, *sources: Path) -> None:
    """Refuse to write the folder ``target`` where that would take what is somebody's.

    With ``force`` a folder is replaced that is empty or holds the file ``mark``, by which fewbit knows its own; never
    another one, nor one that is, or holds, any of ``sources``, which it is made of.

    Raises:
        InputError: it exists, and cannot be replaced; or it has no name of its own, or is a link.
    """
    asked, other = f"writing {target}", "give the name of a new folder"
    if target.name in ("", "..") or target.is_symlink():
        raise InputError(asked, "it is a link" if target.is_symlink() else "that is no folder of its own", other)
    for source in sources:
        if target.resolve() in (source.resolve(), *source.resolve().parents):
            raise InputError(asked, f"it {'is' if target.samefile(source) else 'holds'} {source}", other)
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(asked, "it is a file", other)
    if not (target / mark).is_file() and any(target.iterdir()):
        found = f"it exists and was not written by this command, as it holds no {mark}"
        raise InputError(asked, found, "give another name, or empty it")
    if not force:
        raise InputError(asked, "it exists already", REPLACING)


def take_place(made: Path, target: Path) -> None:
    """Give the finished folder ``made`` the name ``target``, in place of what is there."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(made, target)


REPLACING = "give another name, remove it, or replace it by --force (in Python force=True)"
BEGUN = ".tmp"
"""What the name of a file ends with that is being written; before it, the process that does."""


def remove_begun(folder: Path) -> None:
    """Remove what processes that were killed had begun to write in ``folder``, to which none writes now."""
    for path in folder.glob(f".*{BEGUN}"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, produce: Callable[[Hashing], None], needed: int) -> str:
    """Write ``path`` so that it is either whole or as it was, and return its sha256.

    ``produce`` writes to a temporary name in the same folder, which is flushed to the disk, renamed, and the folder
    flushed. ``needed`` is the number of bytes to come, for the message when the disk is full.

    Raises:
        InputError: no space, no permission, no such folder; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{BEGUN}")
    try:
        with open(temporary, "wb") as stream:
            hashing = Hashing(stream)
            produce(hashing)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(path, needed, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return hashing.state.hexdigest()


def write_bytes(path: Path, data: bytes) -> str:
    """:func:`write_atomically` of bytes at hand."""
    return write_atomically(path, lambda stream: stream.write(data), len(data))


def write_json(path: Path, value: Any) -> str:
    """Atomically, with a fixed layout so that equal values give equal bytes."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _flush_folder(folder: Path) -> None:
    """Make a rename durable; platforms that cannot open a folder have no such call and need none."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(path: Path, needed: int, error: OSError) -> InputError:
    if error.errno == errno.EFBIG:
        return InputError(f"writing {path}, {needed:,} bytes", "a file may not be that large here", "another folder")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
        except OSError:
            free = "the free space is unknown"
        return InputError(
            f"writing {path}, {needed:,} bytes", f"the disk is full: {free}", "free space or another folder"
        )
    return InputError(f"writing {path}", error.strerror or str(error), "an existing folder that you may write to")
