# SPDX-License-Identifier: Apache-2.0
"""Writes a model that the native runtime runs as one file, which :mod:`fewbit.decode.opened` maps again.

The structs say what is in it: whatever their pointers lead to is found among what the model's source keeps, copied once
into the file, and each pointer becomes a place there. What lies in the folder's weight files as kernels read it is not
copied. A new member of a struct needs nothing here.
"""

from __future__ import annotations

import bisect
import ctypes as C
import gc
import json
import shutil
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from fewbit.containers.files import Hashing, write_atomically
from fewbit.containers.shards import weight_files
from fewbit.decode import opened as O
from fewbit.decode.source import Source
from fewbit.errors import InputError, UnsupportedError

STRUCTS, IMAGE, FILES = 0, 1, 2
"""What a relocation points into; see :mod:`fewbit.decode.opened`."""
NUMBERS = {getattr(C, f"c_{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
NUMBERS |= {C.c_float, C.c_double, C.c_bool}
"""Members of structs that mean the same in every process."""
INDICES = ("Sparse.start", "Sparse.index")
"""Members that lead to numbers which the core follows: of the arrays only these are vouched for, byte by byte."""
SPARE = 2
"""An image is written where this many times its bytes are free."""


def write(model: O.Model, folder: Path, activation: str | None) -> tuple[Path, int]:
    """Keep ``model``, which :func:`fewbit.decode.described.described` made of ``folder``; where, and how many bytes.

    Raises:
        InputError: the folder cannot be written to, or the disk has no room.
        UnsupportedError: a struct points to what is no memory of the source, or no memory at all.
    """
    path, names = O.place(folder, activation), [file.path.name for file in weight_files(folder)]
    laid = _lay(_Memory(model.kept), model.address)
    head = {
        "made_from": O.stamp(folder, activation, names),
        "weights": names,
        "mapped": names[: len(model.kept.pages.files)],
        "array_bytes": laid.array_bytes,
        "indices": [[offset, length] for _, length, offset in laid.indices],
        "indices_digest": O.digest(_bytes_at(begin, length) for begin, length, _ in laid.indices),
        "structs": len(laid.structs),
        "model": 0,
        "relocations": len(laid.relocations),
        **{name: getattr(model, name) for name in ("vocab_size", "context", "read_bytes")},
    }
    described = _described(json.dumps(head).encode(), laid)
    nbytes = O.DIGESTED + len(described) + laid.array_bytes
    asked = f"keeping an image of {nbytes:,} bytes as {path}"
    try:
        path.parent.mkdir(exist_ok=True)
        if (free := shutil.disk_usage(path.parent).free) < SPARE * nbytes:
            raise InputError(asked, f"{free:,} bytes are free", "more room on that disk")
        signature = O.signed(described, O.secret())
    except (OSError, RuntimeError) as error:
        raise InputError(asked, str(error), "a folder that you may write to") from error

    def produce(stream: Hashing) -> None:
        stream.write(O.MAGIC + signature + described)
        written = 0
        for begin, length, offset in laid.arrays:
            stream.write(bytes(offset - written))
            stream.write(_bytes_at(begin, length))
            written = offset + length

    write_atomically(path, produce, nbytes)
    return path, nbytes


def _bytes_at(begin: int, length: int) -> memoryview:
    return memoryview((C.c_char * length).from_address(begin)).cast("B")


def _described(head: bytes, laid: _Laid) -> bytes:
    """What the digest covers: all before the arrays."""
    begin = O.aligned(O.HEAD + len(head))
    arrays = O.aligned(begin + len(laid.structs) + 32 * len(laid.relocations))
    table = b"".join(
        struct.pack("<4Q", where, target, offset + (arrays if target == IMAGE else 0), length)
        for where, target, offset, length in laid.relocations
    )
    first = struct.pack("<2Q", arrays, len(head)) + head
    return (first.ljust(begin - O.DIGESTED, b"\0") + bytes(laid.structs) + table).ljust(arrays - O.DIGESTED, b"\0")


@dataclass
class _Laid:
    """``structs``: their bytes. ``relocations``: (place among the structs, what it points into, where, bytes there),
    where counts from the first array for those of the image. ``arrays``: (address, bytes, where), which counts alike;
    ``indices``: those of :data:`INDICES`.
    """

    structs: bytearray = field(default_factory=bytearray)
    relocations: list[tuple[int, int, int, int]] = field(default_factory=list)
    arrays: list[tuple[int, int, int]] = field(default_factory=list)
    indices: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def array_bytes(self) -> int:
        return sum(self.arrays[-1][1:]) if self.arrays else 0


def _lay(memory: _Memory, root: int) -> _Laid:
    """All that the struct at address ``root`` leads to, that struct first."""
    laid, queue = _Laid(), deque([root])
    structs, arrays, room = {root: 0}, {}, 0
    room = O.aligned(C.sizeof(memory.structs[root]))
    while queue:
        begin = queue.popleft()
        held = memory.structs[begin]
        laid.structs += bytes(structs[begin] - len(laid.structs)) + C.string_at(begin, C.sizeof(held))
        for at, member in _pointers(type(held)):
            address = C.c_uint64.from_address(begin + at).value
            if not address:
                continue
            target, first, last = memory.find(address)
            if target == STRUCTS and first not in structs:
                structs[first] = room
                room += O.aligned(last - first)
                queue.append(first)
            if target == IMAGE and first not in arrays:
                arrays[first] = O.aligned(laid.array_bytes)
                laid.arrays.append((first, last - first, arrays[first]))
            if member in INDICES and target != IMAGE:
                raise UnsupportedError("an image of this model", f"{member} leads to no array of its own")
            if member in INDICES:
                laid.indices.append((first, last - first, arrays[first]))
            base = structs[first] if target == STRUCTS else arrays[first] if target == IMAGE else 0
            laid.relocations.append((structs[begin] + at, target, base + address - first, last - address))
    laid.structs += bytes(room - len(laid.structs))
    return laid


def _pointers(kind: Any, begin: int = 0, name: str = "") -> Iterator[tuple[int, str]]:
    """Where in a ctypes type its pointers are, plus ``begin``, and what they are called, ``struct.member``.

    Raises:
        UnsupportedError: it has some that lead to no memory, such as functions.
    """
    if issubclass(kind, C.Structure):
        for member in kind._fields_:
            yield from _pointers(member[1], begin + getattr(kind, member[0]).offset, f"{kind.__name__}.{member[0]}")
    elif issubclass(kind, C.Array):
        for place in range(kind._length_):
            yield from _pointers(kind._type_, begin + place * C.sizeof(kind._type_), name)
    elif kind is C.c_void_p or issubclass(kind, C._Pointer):
        yield begin, name
    elif kind not in NUMBERS:
        raise UnsupportedError("an image of this model", f"a struct has a member of type {kind.__name__}")


class _Memory:
    """What a source keeps, by address. ``structs``: ctypes objects that are no part of others, by their first byte."""

    def __init__(self, source: Source) -> None:
        held = list(_held(source))
        files = [(C.addressof(C.c_char.from_buffer(file)), len(file)) for file in source.pages.files]
        structs = [(C.addressof(value), C.sizeof(value), value) for value in held if not isinstance(value, Tensor)]
        arrays = [(value.data_ptr(), _span(value)) for value in held if isinstance(value, Tensor)]
        self.structs: dict[int, Any] = {}
        end = 0
        for begin, size, value in sorted(structs, key=lambda entry: (entry[0], -entry[1])):
            if begin + size > end:
                self.structs[begin], end = value, begin + size
        spans = [(begin, begin + size, FILES + place) for place, (begin, size) in enumerate(files)]
        mapped = spans.copy()
        spans += [(*span, IMAGE) for span in _united(arrays) if not any(a <= span[0] < b for a, b, _ in mapped)]
        spans += [(begin, begin + C.sizeof(value), STRUCTS) for begin, value in self.structs.items()]
        self._spans = sorted(spans)

    def find(self, address: int) -> tuple[int, int, int]:
        """(what ``address`` lies in, the first byte of that, the byte after its last one)."""
        at = bisect.bisect_right(self._spans, address, key=lambda span: span[0]) - 1
        if at < 0 or address >= self._spans[at][1]:
            raise UnsupportedError("an image of this model", "a struct points to memory that its source does not keep")
        begin, end, target = self._spans[at]
        return target, begin, end


def _held(source: Source) -> Iterator[Any]:
    """The tensors and ctypes objects that ``source`` leads to."""
    stack, seen = [source], set()
    while stack:
        value: Any = stack.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, C.Structure, C.Array)):
            yield value
        else:
            stack += gc.get_referents(value)


def _span(tensor: Tensor) -> int:
    """Bytes from the first element of ``tensor`` to its last one, inclusive."""
    if not tensor.numel():
        return 0
    last = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _united(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those (address, bytes) that overlap as one (address, end): views of one array."""
    begin = end = 0
    for first, size in sorted(spans):
        if first < end:
            end = max(end, first + size)
            continue
        if end > begin:
            yield begin, end
        begin, end = first, first + size
    if end > begin:
        yield begin, end
