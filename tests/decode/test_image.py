# SPDX-License-Identifier: Apache-2.0
"""Images: the same bits as without one, no torch, little memory; and one that does not count is passed over with a
sentence, whatever is wrong with it."""

from __future__ import annotations

import ctypes as C
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.decode import image, open_engine
from fewbit.decode import opened as O
from fewbit.decode.described import described
from fewbit.decode.native_engine import NativeEngine
from fewbit.decode.text import words_of
from fewbit.errors import InputError, UnsupportedError
from fewbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

TOKENS = [5, 9, 3, 44, 7, 30, 12, 60, 8, 21, 33, 17, 2, 50]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def four_bits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tiny, tmp_path_factory.mktemp("four") / "out", "int4/g32/asym")


def quantized(source: Path, out: Path, format: str, **options: Any) -> Path:
    fewbit.quantize(source, format, out=out, **{"force": True, "samples": 4, "context": 32, **options})
    return out


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def kept(folder: Path, activation: str | None = None) -> Path:
    return image.write(described(folder, activation), folder, activation)[0]


def opened(folder: Path, activation: str | None = None) -> NativeEngine:
    engine = open_engine(folder, activation=activation, sequences=2)
    assert isinstance(engine, NativeEngine), engine.why
    return engine


def logits(engine: NativeEngine) -> torch.Tensor:
    sequence = engine.open()
    return torch.cat([engine.feed([(sequence, part)]) for part in (TOKENS, TOKENS[:1])])


def same(folder: Path, activation: str | None = None) -> Path:
    """Logits are the same bits with an image as without; where it is."""
    before = opened(folder, activation)
    expected, path = logits(before), kept(folder, activation)
    after = opened(folder, activation)
    assert before.model.image is None and after.model.image == path
    assert torch.equal(logits(after), expected)
    assert (after.vocab_size, after.context, after.read_bytes) == (before.vocab_size, before.context, before.read_bytes)
    return path


@pytest.mark.parametrize("activation", [None, "int8/channel"])
def test_an_image_gives_the_same_bits(four_bits: Path, tmp_path: Path, activation: str | None) -> None:
    same(copied(four_bits, tmp_path), activation)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("vector2x4", {"head": "palette6/rows16"}),
        ("palette3/row", {}),
        ("W8A8", {"transforms": ["smooth", "rotate"]}),
        ("W8A8_STATIC", {}),
        ("sign/g32", {"method": "billm"}),
        ("palette3/row", {"method": "squeezellm"}),
    ],
)
def test_books_palettes_rewrites_and_sums(tiny: Path, tmp_path: Path, format: str, options: dict[str, Any]) -> None:
    same(quantized(tiny, tmp_path / "out", format, **options))


@pytest.mark.parametrize("family", ["qwen2-moe", "gemma2", "smollm3"])
def test_matrices_that_are_not_quantized(tiny_family: Callable[[str], Path], family: str) -> None:
    """They are not copied where they lie in the folder as kernels read them: the image points into the weight file."""
    folder = tiny_family(family)
    path = same(folder)
    arrays = int.from_bytes(path.read_bytes()[40:48], "little")
    copied, weights = path.stat().st_size - arrays, (folder / "model.safetensors").stat().st_size
    assert (copied < weights / 10) == (family != "qwen2-moe")  # experts are fused by transformers


def test_images_of_one_folder_are_apart(four_bits: Path, tmp_path: Path) -> None:
    folder = copied(four_bits, tmp_path)
    paths = {kept(folder), kept(folder, "int8/channel"), kept(folder, "int8/g32")}
    assert len(paths) == 3 and {path.parent for path in paths} == {folder / ".fewbit"}
    assert opened(folder, "int8/g32").model.image == O.place(folder, "int8/g32")


def refused(folder: Path, why: str) -> None:
    """The image is passed over and the warning says ``why``; the model is the folder's."""
    with pytest.warns(RuntimeWarning, match=f"the image.*{why}.*made anew"):
        engine = opened(folder)
    assert engine.model.image is None
    assert engine.feed([(engine.open(), TOKENS)]).isfinite().all()


@pytest.mark.parametrize("length", [0, 20, 47, 60, 0.02, 0.5, -1])
def test_a_cut_image_is_refused(four_bits: Path, tmp_path: Path, length: float) -> None:
    folder = copied(four_bits, tmp_path)
    path = kept(folder)
    size = path.stat().st_size
    os.truncate(path, int(length * size) if 0 < length < 1 else int(length) % size)
    refused(folder, "it is|it cannot be read|it was")


def test_every_byte_that_leads_somewhere_is_vouched_for(four_bits: Path, tmp_path: Path) -> None:
    """One wrong bit anywhere before the arrays."""
    folder = copied(four_bits, tmp_path)
    path = kept(folder)
    whole = path.read_bytes()
    arrays = int.from_bytes(whole[40:48], "little")
    for at in [0, 7, 8, 39, 40, 47, 48, 56, *range(100, arrays, arrays // 40), arrays - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        with pytest.raises(O.StaleError, match="the image"):
            O.open_image(folder, None)
    path.write_bytes(whole)
    assert O.open_image(folder, None) is not None


def test_damaged_indices_are_refused(tiny: Path, tmp_path: Path) -> None:
    """One that would lead out of the activations; other numbers of the arrays are not read at the start."""
    folder = quantized(tiny, tmp_path / "out", "palette3/row", method="squeezellm")
    path = kept(folder)
    whole = path.read_bytes()
    arrays, length = (int.from_bytes(whole[at : at + 8], "little") for at in (40, 48))
    head = json.loads(whole[56 : 56 + length])
    assert opened(folder).model.image == path and head["indices"]
    for offset, size in (head["indices"][0], head["indices"][-1]):
        damaged = bytearray(whole)
        damaged[arrays + offset + size - 1] ^= 0x80
        path.write_bytes(damaged)
        refused(folder, "its indices are damaged")
    followed = {at for offset, size in head["indices"] for at in range(offset, offset + size)}
    damaged = bytearray(whole)
    damaged[arrays + next(at for at in range(head["array_bytes"]) if at not in followed)] ^= 1
    path.write_bytes(damaged)
    assert opened(folder).model.image == path


@pytest.mark.parametrize(
    "change", [{"place": 4}, {"place": 1 << 40}, {"target": 99}, {"offset": 1 << 63}, {"length": -8}]
)
def test_no_address_leads_out_even_when_vouched_for(four_bits: Path, tmp_path: Path, change: dict[str, int]) -> None:
    folder = copied(four_bits, tmp_path)
    path = kept(folder)
    whole = bytearray(path.read_bytes())
    arrays, length = struct.unpack_from("<2Q", whole, 40)
    head = json.loads(whole[56 : 56 + length])
    first = O.aligned(56 + length) + head["structs"]
    entry = dict(zip(("place", "target", "offset", "length"), struct.unpack_from("<4Q", whole, first), strict=True))
    struct.pack_into("<4Q", whole, first, *(value % (1 << 64) for value in (entry | change).values()))
    whole[8:40] = O.signed(whole[40:arrays], O.secret())
    path.write_bytes(whole)
    refused(folder, "leads out of its file")


def test_an_image_from_elsewhere_is_refused(four_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's secret signed it, as that of whoever made a folder that was downloaded."""
    folder = copied(four_bits, tmp_path)
    kept(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    refused(folder, "made elsewhere")
    secret = tmp_path / "other" / "fewbit" / "secret"
    assert secret.stat().st_mode & 0o077 == 0
    secret.write_bytes(b"")  # an empty key would be no key
    refused(folder, "32 bytes")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00004.safetensors"])
def test_an_image_of_another_state_of_the_folder_is_refused(four_bits: Path, tmp_path: Path, name: str) -> None:
    folder = copied(four_bits, tmp_path)
    kept(folder)
    os.utime(folder / name, ns=(1, 1))
    refused(folder, "files")


def test_an_image_of_another_version_or_machine_is_refused(
    four_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(four_bits, tmp_path)
    kept(folder)
    for target, name, value in (
        (fewbit, "__version__", "0.0.9"),
        (native, "capabilities", lambda: native.FLAGS["avx512vpopcnt"]),
        (O, "MADE_BY", ("core",)),
    ):
        with monkeypatch.context() as patch:
            path = O.place(folder, None)
            patch.setattr(target, name, value)
            patch.setattr(O, "place", lambda *_, path=path: path)
            with pytest.raises(O.StaleError, match=r"version|instructions|build"):
                O.open_image(folder, None)
    assert O.open_image(folder, None) is not None
    whole = bytearray(path.read_bytes().replace(b'"indices"', b'"earlier"', 1))  # a head with other members
    whole[8:40] = O.signed(whole[40 : int.from_bytes(whole[40:48], "little")], O.secret())
    path.write_bytes(whole)
    monkeypatch.setattr(fewbit, "__version__", "0.0.9")
    refused(folder, "version")


def test_a_folder_that_cannot_be_written_to(four_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(four_bits, tmp_path)
    model = described(folder, None)
    (folder / ".fewbit").write_text("in the way")
    with pytest.raises(InputError, match="keeping an image"):
        image.write(model, folder, None)
    (folder / ".fewbit").unlink()
    monkeypatch.setattr(image, "SPARE", 1 << 60)
    with pytest.raises(InputError, match="bytes are free"):
        image.write(model, folder, None)
    assert not list((folder / ".fewbit").iterdir())


def test_what_is_no_memory_of_the_source_is_refused(four_bits: Path) -> None:
    model = described(four_bits, None)
    stray = C.c_char * 64
    root = model.kept.kept[-1]
    root.norm = C.addressof(stray())
    with pytest.raises(UnsupportedError, match="does not keep"):
        image.write(model, four_bits, None)

    class Calling(C.Structure):
        _fields_ = (("x", C.c_int32), ("call", C.CFUNCTYPE(C.c_int)))

    with pytest.raises(UnsupportedError, match="a member of type"):
        list(image._pointers(Calling * 2))


PROBE = """
import json, sys
from pathlib import Path
from fewbit.commands import generate
def numbers(path):
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in open(path) if line.endswith("kB\\n")}
folder = Path(sys.argv[1])
generate.run(generate.Request(folder, "abc", sampling={"temperature": 1.0, "seed": 1, "max_tokens": 20}))
found = {"peak": numbers("/proc/self/status")["VmHWM"], "anonymous": numbers("/proc/self/smaps_rollup")["Anonymous"]}
print("MODULES", json.dumps(found | {"modules": [*sys.modules]}))
from fewbit.commands import serve
import fewbit.serve.app
from fewbit.decode.sampling import Sampling
served = serve.serve(serve.Request(folder), None)
assert "".join(piece.text for piece in served.batcher.stream([5, 6], Sampling(max_tokens=5, temperature=0.0)))
print("MODULES", json.dumps({"modules": [*sys.modules]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_text_without_torch_in_little_memory(four_bits: Path, tmp_path: Path) -> None:
    """`fewbit generate` and `fewbit serve` with an image: neither torch nor transformers nor numpy; 64 MiB beside the
    image and the caches, shared libraries included."""
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    folder = copied(four_bits, tmp_path)
    size = kept(folder).stat().st_size
    environment = os.environ | {"PYTHONPATH": str(Path(fewbit.__file__).parents[1])}
    command = [sys.executable, "-c", PROBE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("MODULES ") for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    generating, serving = (json.loads(line) for line in lines)
    heavy = {"torch", "transformers", "safetensors", "scipy"}
    assert heavy & {*generating["modules"], *serving["modules"]} == set()
    assert "numpy" not in generating["modules"] and "warning" not in done.stderr
    caches = 2 << 20  # a block of 64 positions of this model, rounded up to what its cache asks for at a time
    assert generating["anonymous"] - caches < 64 << 20
    assert generating["peak"] - size - caches < 64 << 20


def test_what_another_user_hides_is_passed_over(
    four_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared folder whose ``.fewbit`` belongs to somebody with another umask runs as if there were none."""
    folder = copied(four_bits, tmp_path)
    expected, path = logits(opened(folder)), kept(folder)
    words = words_of(folder).encode("abc")
    good = Path.is_file

    def hidden(asked: Path) -> bool:
        if asked.parent == path.parent:
            raise PermissionError(13, "Permission denied", str(asked))
        return good(asked)

    monkeypatch.setattr(Path, "is_file", hidden)
    with pytest.warns(RuntimeWarning, match="Permission denied.*made anew"):
        engine = opened(folder)
    assert engine.model.image is None and torch.equal(logits(engine), expected)
    assert words_of(folder).encode("abc") == words
