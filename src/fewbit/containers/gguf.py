# SPDX-License-Identifier: Apache-2.0
"""GGUF, read without trust: everything is checked before anything is allocated.

::

    "GGUF"  version u32  tensors u64  pairs u64
    pairs   x {key: string, type u32, value}         string = length u64, UTF-8; array = type u32, count u64, values
    tensors x {name: string, n u32, sizes u64[n], type u32, offset u64}     sizes fastest first: (columns, rows, ...)
    padding to general.alignment (32 unless given), then the tensors' bytes, each padded to the alignment

All integers are little-endian. Of arrays (a vocabulary is one) it is checked and kept where they lie, not what is in
them. Source: the specification at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks of quantized types
are decoded by the ``gguf`` package, one tensor at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from fewbit.containers.files import size_of
from fewbit.core.room import converted
from fewbit.errors import CorruptFileError, InputError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
LARGEST_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
LONGEST_NAME = 1 << 16
STRING, ARRAY, U64 = 8, 9, 10
FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
VOCABULARY = "tokenizer."
"""What keys of arrays about tokens begin with."""
SCALARS: dict[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""Value type -> struct code. 7 is a boolean, one byte."""
SMALLEST = {**{kind: struct.calcsize(code) for kind, code in SCALARS.items()}, STRING: 8, ARRAY: 12}
"""The least bytes that a value of each type takes, which bounds how many can follow."""

Value = int | float | bool | str


@dataclass(frozen=True)
class Block:
    """One tensor: ``shape`` is slowest first as in numpy, ``begin`` a byte position in the file."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A checked file. ``metadata`` holds scalars and strings; ``arrays`` the element type and count of arrays;
    ``pairs`` where the pair of a key begins and ends."""

    path: Path
    metadata: Mapping[str, Value]
    arrays: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, Block]
    pairs: Mapping[str, tuple[int, int]]

    def get(self, name: str) -> Tensor:
        """One tensor, decoded: float32 in the shape ``tensors[name].shape``.

        Raises:
            InputError: no such tensor, or unreadable.
            UnsupportedError: a block type that the gguf package cannot decode.
            CorruptFileError: the file has changed since its header was checked.
        """
        block = self.tensors.get(name)
        if block is None:
            raise InputError(f"tensor {name} of {self.path}", "there is none of that name")
        try:
            raw = np.fromfile(self.path, dtype=np.uint8, count=block.nbytes, offset=block.begin)
        except OSError as error:
            raise InputError(f"tensor {name} of {self.path}", str(error)) from error
        if raw.size != block.nbytes:
            raise CorruptFileError(f"tensor {name} of {self.path}", "the file became shorter while being read")
        if block.kind in FLOATS:
            return converted(torch.from_numpy(raw).view(FLOATS[block.kind]), torch.float32).reshape(block.shape)
        try:
            values = gguf.dequantize(raw.reshape(*block.shape[:-1], -1), block.kind)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"tensor {name} of {self.path}", f"type {block.kind.name} cannot be decoded"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(block.shape)


def outline(file: GgufFile, out: Path, more: Mapping[str, int]) -> None:
    """Write ``file`` to ``out`` without its vocabulary, each tensor one zero, and with ``more`` pairs: what there is to
    know but of tokens."""
    kept = [place for key, place in file.pairs.items() if key not in file.arrays or not key.startswith(VOCABULARY)]
    with open(file.path, "rb") as source, open(out, "wb") as stream:
        stream.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(file.tensors), len(kept) + len(more)))
        for begin, end in kept:
            source.seek(begin)
            stream.write(source.read(end - begin))
        for key, value in more.items():
            stream.write(_packed(key) + struct.pack("<IQ", U64, value))
        for name in file.tensors:
            stream.write(_packed(name) + struct.pack("<IQIQ", 1, 1, gguf.GGMLQuantizationType.F32, 0))
        stream.write(bytes(2 * LARGEST_ALIGNMENT))


def _packed(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class _Reader:
    """A cursor that never reads past the file's end and never promises more than what is left."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self.stream, self.path, self.size, self.position = stream, path, size, 0

    def fail(self, found: str, works: str = "") -> CorruptFileError:
        return CorruptFileError(f"reading {self.path} as GGUF", f"at byte {self.position}: {found}", works)

    def take(self, count: int) -> bytes:
        self.need(count, "value")
        self.position += count
        data = self.stream.read(count)
        if len(data) != count:
            raise self.fail("the file became shorter while being read")
        return data

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise self.fail(f"a {what} of {count} bytes, but {self.size - self.position} are left", "is it complete?")

    def scalar(self, kind: int) -> int | float | bool:
        (value,) = struct.unpack(SCALARS[kind], self.take(SMALLEST[kind]))
        if kind != 7:
            return value  # type: ignore[no-any-return]
        if value > 1:
            raise self.fail(f"a boolean of {value}")
        return bool(value)

    def u32(self) -> int:
        return int(self.scalar(4))

    def u64(self) -> int:
        return int(self.scalar(10))

    def string(self, longest: int | None = None) -> str:
        length = self.u64()
        if longest is not None and length > longest:
            raise self.fail(f"a name of {length} bytes", f"at most {longest}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string that is not UTF-8 ({error.reason})") from error

    def array(self) -> tuple[int, int]:
        """Walk over an array; its element type and count."""
        kind, count = self.u32(), self.u64()
        if kind == ARRAY or kind not in SMALLEST:
            raise self.fail(f"an array of elements of type {kind}", "scalars or strings")
        self.need(count * SMALLEST[kind], "array")
        if kind == STRING:
            for _ in range(count):
                self.string()
        else:
            self.position += count * SMALLEST[kind]
            self.stream.seek(self.position)
        return kind, count


def open_gguf(path: str | Path) -> GgufFile:
    """Check the header of ``path``; no tensor is read.

    Raises:
        CorruptFileError: truncated, overflowing, overlapping or contradictory.
        UnsupportedError: an old version, big-endian, one part of several, or a tensor type unknown here.
        InputError: absent or unreadable.
    """
    path = Path(path)
    size = size_of(path)
    try:
        with open(path, "rb") as stream:
            return _parse(_Reader(stream, path, size))
    except OSError as error:
        raise InputError(f"reading {path}", str(error)) from error


def _parse(reader: _Reader) -> GgufFile:
    if reader.take(4) != MAGIC:
        raise reader.fail("the file does not begin with GGUF", "a .gguf file")
    version = reader.u32()
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise UnsupportedError(
            f"reading {reader.path}",
            "big-endian GGUF" if swapped else f"GGUF version {version}",
            f"versions {VERSIONS}",
        )
    tensors, pairs = reader.u64(), reader.u64()
    # A tensor entry takes 24 bytes and a pair 13 at the very least: counts that cannot fit are refused at once.
    reader.need(tensors * 24 + pairs * 13, f"header of {tensors} tensors and {pairs} pairs")
    metadata, arrays, places = _pairs(reader, pairs)
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedError(
            f"reading {reader.path}", "one part of a split GGUF", "merge it: llama-gguf-split --merge"
        )
    alignment = _alignment(reader, metadata)
    entries = [_tensor(reader) for _ in range(tensors)]
    start = -(-reader.position // alignment) * alignment
    return GgufFile(reader.path, metadata, arrays, _placed(reader, entries, start, alignment), places)


Places = dict[str, tuple[int, int]]


def _pairs(reader: _Reader, count: int) -> tuple[dict[str, Value], dict[str, tuple[int, int]], Places]:
    metadata: dict[str, Value] = {}
    arrays: dict[str, tuple[int, int]] = {}
    places: Places = {}
    for _ in range(count):
        begin = reader.position
        key, kind = reader.string(LONGEST_NAME), reader.u32()
        if not key or key in metadata or key in arrays:
            raise reader.fail(f"the key {key[:80]!r} appears twice" if key else "an empty key")
        if kind == ARRAY:
            arrays[key] = reader.array()
        elif kind == STRING:
            metadata[key] = reader.string()
        elif kind in SCALARS:
            metadata[key] = reader.scalar(kind)
        else:
            raise reader.fail(f"key {key[:80]!r} has a value of type {kind}", "types 0 to 12")
        places[key] = begin, reader.position
    return metadata, arrays, places


def _alignment(reader: _Reader, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= LARGEST_ALIGNMENT or value & (value - 1):
        raise reader.fail(f"general.alignment is {str(value)[:40]!r}", f"a power of two from 8 to {LARGEST_ALIGNMENT}")
    return value


def _tensor(reader: _Reader) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int, int]:
    """Name, type, shape (slowest first), bytes and offset of one entry of the table."""
    name, dimensions = reader.string(LONGEST_NAME), reader.u32()
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise reader.fail(f"tensor {name[:80]!r} has {dimensions} dimensions", f"1 to {MOST_DIMENSIONS}")
    shape = tuple(reader.u64() for _ in range(dimensions))[::-1]
    kind, offset = reader.u32(), reader.u64()
    try:
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise UnsupportedError(f"tensor {name[:80]!r} of {reader.path}", f"type {kind} is unknown") from error
    if 0 in shape or shape[-1] % block:
        raise reader.fail(f"tensor {name[:80]!r} of shape {shape}", f"positive sizes, rows a multiple of {block}")
    return name, gguf.GGMLQuantizationType(kind), shape, math.prod(shape) // block * nbytes, offset


def _placed(
    reader: _Reader,
    entries: list[tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int, int]],
    start: int,
    alignment: int,
) -> dict[str, Block]:
    """The table with absolute positions, once it is certain that tensors lie in the file, apart and without holes."""
    placed: dict[str, Block] = {}
    end = 0
    for name, kind, shape, nbytes, offset in sorted(entries, key=lambda entry: entry[4]):
        asked = f"tensor {name[:80]!r}"
        if name in placed:
            raise reader.fail(f"{asked} appears twice")
        if offset % alignment:
            raise reader.fail(f"{asked} has offset {offset}", f"a multiple of {alignment}")
        if offset < end:
            raise reader.fail(f"{asked} overlaps the one before it")
        if offset - end >= alignment:
            raise reader.fail(f"{asked} leaves a hole of {offset - end} bytes before it")
        if start + offset + nbytes > reader.size:
            raise reader.fail(
                f"{asked} ends {start + offset + nbytes - reader.size} bytes beyond the file", "is it complete?"
            )
        placed[name] = Block(kind, shape, start + offset, nbytes)
        end = offset + nbytes
    if entries and reader.size - start - end >= alignment:
        raise reader.fail(f"{reader.size - start - end} bytes follow the last tensor")
    return placed
