# SPDX-License-Identifier: Apache-2.0
"""safetensors: the bytes that the safetensors library writes, and none that it or we should not believe."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.containers.safetensors import DTYPES, LARGEST_HEADER, open_safetensors, write_safetensors
from fewbit.errors import CorruptFileError, FewbitError, InputError, UnsupportedError


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header (bytes as they are, anything else as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, dtype in enumerate(DTYPES.values()):
        values = torch.randint(0, 2, (3, number + 1), generator=generator)
        found[f"t.{dtype}"] = values.to(dtype)
    return {**found, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "é": torch.ones(1, dtype=torch.uint8)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit, for dtypes that torch cannot compare as well."""
    flat = (one.contiguous().reshape(-1), other.contiguous().reshape(-1))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*(x.view(torch.uint8) for x in flat))


def test_bytes_equal_those_of_the_safetensors_library(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = tensors()
    write_safetensors(ours, values, {"format": "pt"})
    save_file(values, theirs, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    write_safetensors(ours, values)
    save_file(values, theirs)
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_the_library_writes_is_read_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    values = tensors()
    save_file(values, path, {"a": "b"})
    file = open_safetensors(path)
    assert file.metadata == {"a": "b"}
    assert file.entries.keys() == values.keys()
    for name, value in values.items():
        assert same(file.get(name), value)
        assert file.entries[name].shape == tuple(value.shape)
        assert file.entries[name].nbytes == value.nbytes
    with pytest.raises(InputError, match="none of that name"):
        file.get("other")


def test_the_order_of_tensors_does_not_matter_and_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    values = tensors()
    one = write_safetensors(tmp_path / "a", values)
    two = write_safetensors(tmp_path / "b", dict(reversed(values.items())))
    assert one == two == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert all(same(load_file(tmp_path / "b")[name], value) for name, value in values.items())


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_safetensors(tmp_path / "a", {"t": base.T, "s": base[:, 1:3], "e": base[:1].expand(5, 4)})
    got = open_safetensors(tmp_path / "a")
    assert torch.equal(got.get("t"), base.T)
    assert torch.equal(got.get("s"), base[:, 1:3])
    assert torch.equal(got.get("e"), base[:1].expand(5, 4))


def test_dtypes_that_the_format_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="complex64"):
        write_safetensors(tmp_path / "a", {"t": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


GOOD = {"a": entry()}
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 8"),
    "seven bytes": (b"\1" * 7, "at least 8"),
    "header longer than the file": (raw(b"{}", length=3), "header"),
    "header of 2^64-1 bytes": (raw(b"{}", length=2**64 - 1), "header"),
    "header of 2^63 bytes": (raw(b"{}", length=2**63), "header"),
    "header above the limit": (raw(b"{}", length=LARGEST_HEADER + 1), "header"),
    "header not UTF-8": (raw(b'{"\xff": 1}'), "utf-8"),
    "header not JSON": (raw(b"{'a': 1}"), "JSON"),
    "header not an object": (raw(b"[]"), "list"),
    "header nested too deeply": (raw(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "nests lists|JSON"),
    "header nested deeply in objects": (raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "JSON"),
    "a tensor twice": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8), "twice"),
    "a field twice": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "twice",
    ),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not an object": (raw({"__metadata__": [1]}), "__metadata__"),
    "no dtype": (raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8), "malformed"),
    "an extra field": (raw({"a": {**entry(), "stride": [1]}}, b"\0" * 8), "malformed"),
    "an entry that is a number": (raw({"a": 3}), "malformed"),
    "unknown dtype": (raw({"a": entry("Q9")}, b"\0" * 8), "dtype"),
    "dtype a list": (raw({"a": entry(["F32"])}, b"\0" * 8), "dtype"),
    "negative size": (raw({"a": entry(shape=[-2])}, b"\0" * 8), "shape"),
    "negative sizes whose product fits": (raw({"a": entry(shape=[-2, -1])}, b"\0" * 8), "shape"),
    "size a float": (raw({"a": entry(shape=[2.0])}, b"\0" * 8), "shape"),
    "size true": (raw({"a": entry(shape=[True, 2])}, b"\0" * 8), "shape"),
    "shape a number": (raw({"a": entry(shape=2)}, b"\0" * 8), "shape"),
    "size beyond 64 bits": (raw({"a": entry(shape=[2**64 + 2])}, b"\0" * 8), "shape"),
    "seventeen dimensions": (raw({"a": entry(shape=[1] * 16 + [2])}, b"\0" * 8), "shape"),
    "product wraps to 0 in 64 bits": (raw({"a": entry(shape=[2**32, 2**32], offsets=[0, 0])}), "takes"),
    "product wraps to 8 in 64 bits": (raw({"a": entry("U8", [2**61 + 1, 8])}, b"\0" * 8), "takes"),
    "bytes too few for the shape": (raw({"a": entry(shape=[3])}, b"\0" * 8), "takes"),
    "offsets reversed": (raw({"a": entry(offsets=[8, 0])}, b"\0" * 8), "takes"),
    "offsets negative": (raw({"a": entry(offsets=[-8, 0])}, b"\0" * 8), "data_offsets"),
    "offsets three": (raw({"a": entry(offsets=[0, 4, 8])}, b"\0" * 8), "data_offsets"),
    "beyond the end": (raw(GOOD, b"\0" * 7), "complete"),
    "data left over": (raw(GOOD, b"\0" * 9), "short of the file's end"),
    "hole at the start": (raw({"a": entry(offsets=[4, 12])}, b"\0" * 12), "hole"),
    "hole in the middle": (raw({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "hole"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
    "one tensor at two names": (raw({"a": entry(), "b": entry()}, b"\0" * 8), "overlaps"),
    "data without a tensor": (raw({}, b"\0" * 8), "short of the file's end"),
    "zip after the data (polyglot)": (raw(GOOD, b"\0" * 8 + b"PK\3\4"), "short of the file's end"),
    "pickle instead": (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.", "header"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case: str, tmp_path: Path) -> None:
    data, words = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FewbitError, match=words) as caught:
        open_safetensors(path)
    assert isinstance(caught.value, (CorruptFileError, UnsupportedError))


def test_the_smallest_files_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for data in (raw({}), raw(b"{}      "), raw(GOOD, b"\0" * 8), raw({"a": entry(shape=[0], offsets=[0, 0])})):
        path.write_bytes(data)
        for name in open_safetensors(path).entries:
            open_safetensors(path).get(name)


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw(GOOD, b"\0" * 8))
    file = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="shorter"):
        file.get("a")
    path.unlink()
    with pytest.raises(InputError):
        file.get("a")


@pytest.mark.parametrize("name", ["absent", ".", "a\0b"])
def test_what_is_no_file_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        open_safetensors(tmp_path / name)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from fewbit.containers.safetensors import write_safetensors
from fewbit.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = Path(sys.argv[1])
try:
    write_safetensors(path, {"a": torch.zeros(1_000_000)})
except InputError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_the_old_file_and_says_how_much_was_needed(tmp_path: Path) -> None:
    """A limit on file sizes fails a write in the middle, as a full disk does."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()
    program = FULL_DISK
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search("4,000,0[0-9][0-9] bytes.*may not be that large", done.stdout)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"[0-9]+ bytes; the disk is full: [0-9,]+ bytes are free"):
        write_safetensors(tmp_path / "x", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x", {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="existing folder"):
        write_safetensors(tmp_path / "no" / "x", {"a": torch.ones(3)})
