# SPDX-License-Identifier: Apache-2.0
"""Opens an image: a model as the native runtime reads it, in one file that :mod:`fewbit.decode.image` wrote. Its arrays
stay pages of the file, which processes share; nothing is read before it is used, and torch is not needed.

::

    bytes 0..7    FEWBITI and the version of this layout
    bytes 8..39   blake2b of bytes 40..a, keyed by this user's secret
    bytes 40..47  a, where the arrays begin, little-endian as all numbers here
    bytes 48..55  n, the length of the head
    56..56+n      the head: JSON, see :func:`_checked`
    then          the structs; every one begins at a multiple of 64, and so do they
    then          relocations, four numbers each: the place of a pointer among the structs, what it points into (0: the
                  structs, 1: the image, 2 and more: the weight files that the head lists, in their order), where there,
                  and how many bytes from there on belong to it
    a..           the arrays, each at a multiple of 64

The structs hold sizes that the core believes. So an image counts only with a digest that this user alone can make: a
folder from elsewhere may bring one, and it is passed over. Arrays are not read at the start, but for those of indices,
which are few and which the core follows: the head vouches for them.
"""

from __future__ import annotations

import ctypes as C
import hashlib
import hmac
import json
import mmap
import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewbit
from fewbit.containers.files import member
from fewbit.decode import structs as S
from fewbit.errors import FewbitError
from fewbit.kernels import native
from fewbit.model.tokenizer import NUMBERED

MAGIC = b"FEWBITI\x01"
DIGESTED = 40
HEAD = 56
ALIGNED = 64
FOLDER = ".fewbit"
WATCHED = ("config.json", "fewbit.json", "model.safetensors.index.json")
"""Files beside the weights that a model's description depends on."""
MADE_BY = ("core", "decode", "formats", "kernels", "layouts")
"""Parts of the package whose code decides what an image holds."""


class StaleError(FewbitError):
    """There is an image, but not of this model, or not for this machine or version: it is to be made anew."""


@dataclass(frozen=True)
class Model:
    """What the native runtime runs.

    * ``address``: of its :class:`fewbit.decode.structs.Model`. ``kept``: what keeps that, and all that it points to.
    * ``vocab_size``, ``context``: as of :class:`fewbit.decode.Engine`.
    * ``read_bytes``: of weights, that one decoded token reads. ``image``: where it lies, None: made from the folder.
    """

    address: int
    vocab_size: int
    context: int
    read_bytes: int
    kept: Any
    image: Path | None = None


def place(folder: Path, activation: str | None) -> Path:
    """Where the image of ``folder`` lies for this machine; ``activation`` as it was spelt."""
    spelt = "float" if activation is None else "".join(c if c.isalnum() else "-" for c in activation)
    return folder / FOLDER / f"engine-{spelt}-{native.isas()[0]}.bin"


def stamp(folder: Path, activation: str | None, weights: list[str]) -> dict[str, Any]:
    """What an image must have been made from to count: this build of the library on this machine, and the files
    ``weights``, :data:`WATCHED`, and what numbers tokens, as they are now: sizes and times of change."""
    package = Path(fewbit.__file__).parent
    code = [path for part in MADE_BY for path in sorted((package / part).glob("*.py"))]
    build = [(path.name, *state_of(path)) for path in [*code, *sorted(package.glob("_native*"))]]
    return {
        "version": fewbit.__version__,
        "build": hashlib.sha256(repr(build).encode()).hexdigest(),
        "struct_bytes": C.sizeof(S.Model),
        "instructions": native.capabilities(),
        "activation": activation,
        "files": {name: state_of(member(folder, name)) for name in (*WATCHED, *weights)},
        "tokens": {name: state_of(folder / name) for name in NUMBERED},
    }


def state_of(path: Path) -> list[int]:
    """[bytes, nanoseconds of its last change]; nothing where there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return []
    return [found.st_size, found.st_mtime_ns]


def secret() -> bytes:
    """32 bytes that only this user reads, made at first use, in the user's cache.

    Raises:
        OSError, RuntimeError: it can be neither read nor made.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbit" / "secret"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".secret.{os.getpid()}")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(32))
        os.replace(new, path)
    found = path.read_bytes()
    if len(found) != 32:
        raise OSError(f"{path} does not hold 32 bytes")
    return found


def signed(digested: bytes | memoryview, key: bytes) -> bytes:
    """The 32 bytes that vouch for a head, structs and relocations."""
    return hashlib.blake2b(digested, digest_size=32, key=key).digest()


def digest(pieces: Iterable[bytes | memoryview]) -> str:
    """Of arrays, one after the other."""
    made = hashlib.blake2b(digest_size=32)
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()


def open_image(folder: Path, activation: str | None) -> Model | None:
    """The model in ``folder`` from its image; None where there is none.

    Raises:
        StaleError: there is one that does not count, and why.
    """
    path = place(folder, activation)
    try:
        if not path.is_file():
            return None
        image = _Pages(path)
        head, begin = _checked(image, folder, activation)
        return _related(path, image, head, begin, [_Pages(member(folder, name)) for name in head["mapped"]])
    except _Wrong as error:
        found = str(error)
    except (OSError, RuntimeError, ValueError, FewbitError) as error:
        found = f"it cannot be read: {error}"
    raise StaleError(f"the image {path}", found, "the model is made anew from its folder")


class _Wrong(Exception):
    """Why an image does not count."""


class _Pages:
    """A file mapped privately: nothing written here would reach it. ``data``: its bytes; ``address``: where they lie,
    as long as this lives."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as stream:
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        self._first = C.c_char.from_buffer(self.data)
        self.address = C.addressof(self._first)

    def word(self, at: int) -> int:
        return int.from_bytes(self.data[at : at + 8], "little")


def _checked(image: _Pages, folder: Path, activation: str | None) -> tuple[dict[str, Any], int]:
    """The head, and where the structs begin. The head is ``made_from``, the :func:`stamp`; ``weights``, the files of
    the model, and ``mapped``, those that relocations name; ``array_bytes``, of all arrays; ``indices``, where among
    them arrays of indices are, and their ``indices_digest``; ``structs``, how many bytes they are, and ``model``,
    where among them the model's is; ``relocations``, how many; and the numbers of :class:`Model`."""
    size = len(image.data)
    if size < HEAD or image.data[: len(MAGIC)] != MAGIC:
        raise _Wrong("it is none, or of another version")
    arrays = image.word(DIGESTED)
    if not HEAD <= arrays <= size:
        raise _Wrong("it is cut off")
    if not hmac.compare_digest(signed(image.data[DIGESTED:arrays], secret()), image.data[8:40]):
        raise _Wrong("it was made elsewhere, or is damaged")
    end = HEAD + image.word(HEAD - 8)
    head: dict[str, Any] = json.loads(image.data[HEAD:end])
    if arrays + head["array_bytes"] != size:
        raise _Wrong("it is cut off")
    now, then = stamp(folder, activation, head["weights"]), head["made_from"]
    changed = [name for name, value in now.items() if value != then[name]]
    if changed:
        raise _Wrong(f"it was made from another state of things ({', '.join(changed)})")
    indices = (image.data[arrays + offset : arrays + offset + length] for offset, length in head["indices"])
    if digest(indices) != head["indices_digest"]:
        raise _Wrong("its indices are damaged")
    return head, aligned(end)


def aligned(offset: int) -> int:
    """The next multiple of :data:`ALIGNED`."""
    return -(-offset // ALIGNED) * ALIGNED


def _related(path: Path, image: _Pages, head: dict[str, Any], begin: int, files: list[_Pages]) -> Model:
    """The model, its structs a copy of those in the image with addresses for offsets."""
    middle = begin + head["structs"]
    structs = (C.c_uint64 * (head["structs"] // 8)).from_buffer_copy(image.data[begin:middle])
    bases = [C.addressof(structs), image.address, *(file.address for file in files)]
    sizes = [C.sizeof(structs), *(len(pages.data) for pages in (image, *files))]
    table = image.data[middle : middle + 32 * head["relocations"]]
    for place, target, offset, length in struct.iter_unpack("<4Q", table):
        at, rest = divmod(place, 8)
        if rest or at >= len(structs) or target >= len(sizes) or offset + length > sizes[target]:
            raise _Wrong("an address in it leads out of its file")
        structs[at] = bases[target] + offset
    if head["model"] + C.sizeof(S.Model) > C.sizeof(structs):
        raise _Wrong("it is cut off")
    address = C.addressof(structs) + head["model"]
    return Model(address, head["vocab_size"], head["context"], head["read_bytes"], (structs, image, *files), path)
