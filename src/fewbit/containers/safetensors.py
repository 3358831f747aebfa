# SPDX-License-Identifier: Apache-2.0
"""safetensors, read without trust and written without halves.

::

    bytes 0..7      n, the length of the header, little-endian
    bytes 8..8+n    JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {}}
    the rest        the tensors, row-major, little-endian; offsets count from here, leave no hole and never overlap

The header is checked in full before a byte of data is read, and data is read by offset rather than mapped: a file
that shrinks under our feet is then an error instead of a bus error, and a limit on address space counts only what is
used. Source: the format's description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.containers.files import Hashing, parse_json, size_of, write_atomically
from fewbit.core.room import room
from fewbit.errors import CorruptFileError, InputError, UnsupportedError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
MOST_DIMENSIONS = 16
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""In the order in which the safetensors library ranks them; tensors are written in reverse, wide ones first, so that
each is aligned to its own size."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``begin`` and ``end`` are byte positions in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsFile:
    """A checked file; ``entries`` by tensor name, in the order of their bytes."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def get(self, name: str) -> Tensor:
        """One tensor, freshly read.

        Raises:
            InputError: no such tensor.
            CorruptFileError: the file has changed since its header was checked.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise InputError(f"tensor {name} of {self.path}", "there is none of that name")
        data = room((entry.nbytes,), torch.uint8)
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(entry.begin)
                got, view = 0, memoryview(data.numpy())  # type: ignore[arg-type]
                while got < entry.nbytes:
                    count = stream.readinto(view[got:])
                    if not count:
                        raise CorruptFileError(
                            f"tensor {name} of {self.path}", "the file became shorter while being read"
                        )
                    got += count
        except OSError as error:
            raise InputError(f"tensor {name} of {self.path}", str(error)) from error
        return data.view(entry.dtype).reshape(entry.shape)


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Check the header of ``path``; no tensor is read.

    Raises:
        CorruptFileError: anything two readers could disagree about, or that asks for more memory than justified.
        InputError: absent or unreadable.
    """
    path = Path(path)
    size = size_of(path)
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise CorruptFileError(
                    f"reading {path} as safetensors", f"it has {size} bytes", "at least 8 are needed"
                )
            length = int.from_bytes(start, "little")
            if length > min(LARGEST_HEADER, size - 8):
                raise CorruptFileError(
                    f"reading {path} as safetensors",
                    f"its header claims {length} bytes and the file has {size - 8} after the length",
                    f"a header inside the file, of at most {LARGEST_HEADER} bytes; is the download complete?",
                )
            raw = stream.read(length)
    except OSError as error:
        raise InputError(f"reading {path}", str(error)) from error
    # Each tensor has one object and two lists: more lists than that would only serve to blow up the parser's memory.
    if raw.count(b"[") > 2 * raw.count(b"{") + raw.count(b'"'):
        raise CorruptFileError(f"the header of {path}", "it nests lists where none belong")
    header = parse_json(raw, f"the header of {path}")
    metadata = _metadata(path, header.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    return SafetensorsFile(path, _covering(path, entries, 8 + length, size), metadata)


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CorruptFileError(f"__metadata__ of {path}", "it is not an object of strings")
    return value


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    asked = f"tensor {name[:200]!r} of {path}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(asked, "its header entry is malformed", "exactly dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UnsupportedError(asked, f"dtype {str(kind)[:40]!r} is unknown", f"one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(_natural(size) for size in shape):
        raise CorruptFileError(asked, f"its shape {str(shape)[:80]} is not a list of at most {MOST_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(place) for place in offsets):
        raise CorruptFileError(asked, f"its data_offsets {str(offsets)[:80]} are not two positions")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != needed:
        raise CorruptFileError(asked, f"shape {shape} of {kind} takes {needed} bytes, its offsets hold {end - begin}")
    return Entry(DTYPES[kind], tuple(shape), start + begin, start + end)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _covering(path: Path, entries: dict[str, Entry], start: int, size: int) -> dict[str, Entry]:
    """The entries in the order of their bytes, once it is certain that they cover the data exactly."""
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for name, entry in ordered.items():
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CorruptFileError(f"tensor {name[:200]!r} of {path}", f"it {what}")
        position = entry.end
    if position != size:
        what = "beyond the end of the file; is the download complete?" if position > size else "short of the file's end"
        raise CorruptFileError(f"the tensors of {path}", f"they end {abs(size - position)} bytes {what}")
    return ordered


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write ``tensors`` atomically and return the file's sha256. Same tensors, same bytes, in whatever order they come:
    those that the safetensors library writes.

    Raises:
        InputError: the disk is full (the message says what was needed) or not writable; nothing is left behind.
        UnsupportedError: a dtype that the format cannot hold.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise UnsupportedError(f"tensor {name} in safetensors", f"dtype {tensor.dtype}", f"one of {list(NAMES)}")
    ranks = {dtype: -rank for rank, dtype in enumerate(DTYPES.values())}
    ordered = sorted(tensors.items(), key=lambda item: (ranks[item[1].dtype], item[0].encode()))
    position = 0
    for name, tensor in ordered:
        end = position + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)

    def produce(stream: Hashing) -> None:
        stream.write(len(raw).to_bytes(8, "little"))
        stream.write(raw)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                stream.write(flat.view(torch.uint8).numpy().data)

    return write_atomically(path, produce, 8 + len(raw) + position)
