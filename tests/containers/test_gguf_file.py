# SPDX-License-Identifier: Apache-2.0
"""GGUF: what the gguf package writes is read as it reads it; every known way to fool a reader is refused by name."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fewbit.containers.gguf import open_gguf
from fewbit.errors import CorruptFileError, FewbitError, InputError, UnsupportedError

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """``sizes`` as in the file, fastest first."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def build(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    number = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *number) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + data


ONE = [tensor("a", (8,))]
TWO = [tensor("a", (8,)), tensor("b", (8,), offset=32)]

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "left"),
    "another magic": (b"GGML" + build()[4:], "begin with GGUF"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    # gguf-py pull 27188: a file of 43 bytes with a huge count kept the reader busy and its memory growing.
    "2^61 tensors in a short file": (build(counts=(2**61, 0)), "header of"),
    "2^64-1 pairs in a short file": (build(counts=(0, 2**64 - 1)), "header of"),
    "2^40 tensors, one there": (build(tensors=ONE, counts=(2**40, 0)), "header of"),
    # CVE-2025-53630 and its way around, CVE-2026-27940: sizes whose product or sum wraps in 64 bits.
    "product wraps to 0 (2^42 and 2^22)": (build(tensors=[tensor("a", (2**42, 2**22))]), "beyond the file"),
    "product wraps to 8": (build(tensors=[tensor("a", (2**61 + 1, 8))], data=b"\0" * 32), "beyond the file"),
    "bytes wrap in the sum of offset and size": (
        build(tensors=[tensor("a", (8,), offset=2**64 - 32)], data=b"\0" * 32),
        "hole|beyond",
    ),
    "sizes at the limit": (build(tensors=[tensor("a", (2**64 - 1,) * 4)]), "beyond the file"),
    "size zero": (build(tensors=[tensor("a", (0, 8))]), "positive sizes"),
    "no dimension": (build(tensors=[tensor("a", ())]), "dimensions"),
    "five dimensions": (build(tensors=[tensor("a", (1,) * 5)], data=b"\0" * 32), "dimensions"),
    "2^32-1 dimensions": (build(tensors=[text("a") + struct.pack("<IIQ", 2**32 - 1, 0, 0)]), "dimensions"),
    "row no multiple of the block": (build(tensors=[tensor("a", (31, 1), 8)], data=b"\0" * 64), "multiple of 32"),
    "unknown type": (build(tensors=[tensor("a", (8,), 99)], data=b"\0" * 32), "type 99"),
    "type that was removed": (build(tensors=[tensor("a", (8,), 4)], data=b"\0" * 32), "type 4"),
    "beyond the end": (build(tensors=ONE, data=b"\0" * 31), "beyond the file"),
    "no data": (build(tensors=ONE), "beyond the file"),
    "offset not aligned": (build(tensors=[tensor("a", (8,), offset=4)], data=b"\0" * 64), "multiple of 32"),
    "overlap": (build(tensors=[tensor("a", (16,)), tensor("b", (8,), offset=32)], data=b"\0" * 64), "overlaps"),
    "one place, two names": (build(tensors=[tensor("a", (8,)), tensor("b", (8,))], data=b"\0" * 32), "overlaps"),
    "hole": (build(tensors=[tensor("a", (8,)), tensor("b", (8,), offset=64)], data=b"\0" * 96), "hole"),
    "hole before the first": (build(tensors=[tensor("a", (8,), offset=32)], data=b"\0" * 64), "hole"),
    "a tensor twice": (build(tensors=[tensor("a", (8,)), tensor("a", (8,), offset=32)], data=b"\0" * 64), "twice"),
    "data left over": (build(tensors=ONE, data=b"\0" * 64), "follow"),
    # CVE-2024-21802: lengths of strings and arrays taken on trust.
    "string of 2^64-1 bytes": (build([pair("k", STRING, struct.pack("<Q", 2**64 - 1))]), "left"),
    "string beyond the end": (build([pair("k", STRING, struct.pack("<Q", 1000) + b"x")]), "left"),
    "key of 2^63 bytes": (build([struct.pack("<Q", 2**63) + b"\0" * 8], counts=(0, 1)), "name of"),
    "name longer than any name": (build(tensors=[tensor("a" * 70_000, (8,))], data=b"\0" * 32), "name of"),
    "array of 2^61 u64": (build([pair("k", ARRAY, struct.pack("<IQ", U64, 2**61))]), "left"),
    "array of 2^60 strings": (build([pair("k", ARRAY, struct.pack("<IQ", STRING, 2**60))]), "left"),
    "array of strings beyond the end": (build([pair("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a"))]), "left"),
    # Pull 26690: the type of an array's elements was not checked.
    "array of type 13": (build([pair("k", ARRAY, struct.pack("<IQ", 13, 1) + b"\0" * 8)]), "type 13"),
    "array of arrays": (build([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + b"\0" * 40)]), "type 9"),
    "value of type 13": (build([pair("k", 13, b"\0" * 8)]), "type 13"),
    "boolean of 2": (build([pair("k", BOOL, b"\2")]), "boolean"),
    "string not UTF-8": (build([pair("k", STRING, text(b"\xff\xfe"))]), "UTF-8"),
    "key not UTF-8": (build([text(b"\xff") + struct.pack("<IB", U8, 1)]), "UTF-8"),
    "empty key": (build([pair("", U8, b"\1")]), "empty key"),
    "key twice": (build([pair("k", U8, b"\1"), pair("k", U8, b"\1")]), "twice"),
    "alignment 0": (build([pair("general.alignment", U32, struct.pack("<I", 0))]), "power of two"),
    "alignment 24": (build([pair("general.alignment", U32, struct.pack("<I", 24))]), "power of two"),
    "alignment 2^31": (build([pair("general.alignment", U32, struct.pack("<I", 2**31))]), "power of two"),
    "alignment a string": (build([pair("general.alignment", STRING, text("32"))]), "power of two"),
    "alignment not a number": (
        build([pair("general.alignment", F32, struct.pack("<f", float("nan")))]),
        "power of two",
    ),
    "one part of several": (build([pair("split.count", U32, struct.pack("<I", 3))]), "split"),
    "split count a string": (build([pair("split.count", STRING, text("many"))]), "split"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(FewbitError, match=words) as caught:
        open_gguf(path)
    assert time.perf_counter() - start < 2
    assert isinstance(caught.value, (CorruptFileError, UnsupportedError))


def test_the_smallest_files_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    values = np.arange(16, dtype=np.float32)
    for data in (
        build(),
        build([pair("k", BOOL, b"\1"), pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text(""))]),
        build(tensors=ONE, data=values[:8].tobytes()),
        build(tensors=TWO, data=values.tobytes()),
        build(tensors=TWO[::-1], data=values.tobytes()),
        build(tensors=TWO, data=values.tobytes(), version=2),
    ):
        path.write_bytes(data)
        file = open_gguf(path)
        for number, name in enumerate(file.tensors):
            assert torch.equal(file.get(name), torch.from_numpy(values[8 * number : 8 * number + 8]))


def test_every_cut_of_a_good_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    pairs = [pair("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yz")), pair("n", U64, b"\1" * 8)]
    good = build(pairs, TWO, b"\1" * 64)
    for end in range(len(good)):
        path.write_bytes(good[:end])
        with pytest.raises(CorruptFileError):
            open_gguf(path)
    path.write_bytes(good)
    open_gguf(path)


def write(
    path: Path, values: dict[str, tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]], alignment: int
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_name("é")
    writer.add_array("words", ["a", "b", "ç"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("yes", True)
    writer.add_float32("half", 0.5)
    for name, (value, kind) in values.items():
        writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_what_the_gguf_package_writes_is_read_as_it_reads_it(alignment: int, tmp_path: Path) -> None:
    kinds = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0"]
    generator = np.random.default_rng(0)
    values = {
        f"{name}.{rows}": (generator.normal(size=(rows, 512)).astype(np.float32), gguf.GGMLQuantizationType[name])
        for name in kinds
        for rows in (1, 3)
    }
    values["stack"] = (generator.normal(size=(2, 3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path / "x.gguf"
    write(path, values, alignment)
    file = open_gguf(path)
    assert file.metadata["general.name"] == "é" and file.metadata["yes"] is True and file.metadata["half"] == 0.5
    assert file.arrays["words"] == (STRING, 3) and file.arrays["numbers"][1] == 3
    reader = gguf.GGUFReader(path)
    assert {found.name for found in reader.tensors} == file.tensors.keys()
    for found in reader.tensors:
        want = gguf.dequantize(found.data, found.tensor_type)
        got = file.get(found.name)
        assert got.dtype == torch.float32 and got.shape == values[found.name][0].shape
        assert np.array_equal(got.numpy(), want.reshape(got.shape))
        assert file.tensors[found.name].begin == found.data_offset
        assert file.tensors[found.name].nbytes == found.n_bytes


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build(tensors=ONE, data=b"\0" * 32))
    file = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="shorter"):
        file.get("a")
    with pytest.raises(InputError, match="none of that name"):
        file.get("b")
    path.unlink()
    with pytest.raises(InputError):
        file.get("a")
