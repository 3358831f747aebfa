# SPDX-License-Identifier: Apache-2.0
"""Readers under mutated files: nothing but fewbit's errors comes out, and memory stays within what a file justifies."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.containers.gguf import open_gguf
from fewbit.containers.safetensors import open_safetensors
from fewbit.errors import FewbitError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel

FACTOR, SLACK = 4, 1 << 18
"""Most bytes a reader may hold: so many times the file, and so much for the interpreter's own small objects."""

EDGES = [0, 1, 2, 7, 8, 13, 31, 32, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63,
         2**64 - 32, 2**64 - 1]  # fmt: skip

Edit = tuple[str, float, int, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "u32", "u64", "cut", "drop", "insert", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(EDGES),
        st.binary(min_size=1, max_size=24),
    ),
    min_size=1,
    max_size=4,
)
TIMES = int(os.environ.get("FEWBIT_FUZZ", "1"))
"""How many times the usual number of examples; CI's own step of fuzzing asks for more."""
QUICK = settings(max_examples=300 * TIMES, deadline=None, suppress_health_check=list(HealthCheck))
SLOW = settings(QUICK, max_examples=40 * TIMES)


def mutated(data: bytes, edits: list[Edit], header: int) -> bytes:
    """``data`` after ``edits``, which fall on the first ``header`` bytes, where all the decisions are."""
    for kind, place, number, chunk in edits:
        at = int(place * min(header, len(data))) if data else 0
        if kind == "byte":
            data = data[:at] + bytes([number % 256]) + data[at + 1 :]
        elif kind in ("u32", "u64"):
            packed = struct.pack("<Q", number)[: 4 if kind == "u32" else 8]
            data = data[:at] + packed + data[at + len(packed) :]
        elif kind == "cut":
            data = data[: int(place * len(data))]
        elif kind == "drop":
            data = data[:at] + data[at + len(chunk) :]
        elif kind == "insert":
            data = data[:at] + chunk + data[at:]
        else:
            data = data[:at] + data[at // 2 : at // 2 + len(chunk)] + data[at:]
    return data


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Fails when more than the file justifies was held at once. What torch reads goes through Python's own buffers."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= FACTOR * size + SLACK, (peak, size)


def survives(data: bytes, name: str, read: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        with bounded(len(data)):
            try:
                read(path)
            except FewbitError as error:
                assert str(error)


def read_safetensors(path: Path) -> None:
    file = open_safetensors(path)
    for name, entry in file.entries.items():
        assert tuple(file.get(name).shape) == entry.shape


def read_gguf(path: Path) -> None:
    file = open_gguf(path)
    for name, block in file.tensors.items():
        assert tuple(file.get(name).shape) == block.shape


@pytest.fixture(scope="module")
def safetensors_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    values = {f"layer.{n}": torch.full((n, 3), float(n), dtype=kind) for n, kind in
              enumerate([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])}  # fmt: skip
    save_file({**values, "big": torch.zeros(64, 64)}, path, {"format": "pt"})
    return path.read_bytes()


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_array("words", ["a", "bc", "def"])
    writer.add_array("scores", [0.5, 1.5])
    for name, kind in (("a", "Q8_0"), ("b", "F32"), ("c", "Q4_K"), ("d", "Q6_K"), ("e", "F16"), ("f", "TQ1_0")):
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        rows = np.zeros((2, max(256 // block, 1) * nbytes), dtype=np.uint8)
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@QUICK
@given(edits=EDITS)
def test_safetensors(safetensors_bytes: bytes, edits: list[Edit]) -> None:
    header = 8 + int.from_bytes(safetensors_bytes[:8], "little")
    survives(mutated(safetensors_bytes, edits, header), "x.safetensors", read_safetensors)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(EDGES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(QUICK, max_examples=150 * TIMES)
@given(header=st.dictionaries(st.text(max_size=8), JSON | st.fixed_dictionaries(
    {"dtype": JSON | st.sampled_from(["F32", "U8"]),
     "shape": JSON | st.lists(st.sampled_from(EDGES), max_size=4),
     "data_offsets": JSON | st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES))}), max_size=4),
       data=st.binary(max_size=64))  # fmt: skip
def test_safetensors_headers_of_any_json(header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    survives(struct.pack("<Q", len(text)) + text + data, "x.safetensors", read_safetensors)


@QUICK
@given(edits=EDITS)
def test_gguf(gguf_bytes: bytes, edits: list[Edit]) -> None:
    survives(mutated(gguf_bytes, edits, 700), "x.gguf", read_gguf)


@QUICK
@given(data=st.binary(max_size=200))
def test_gguf_of_any_bytes(data: bytes) -> None:
    survives(b"GGUF\3\0\0\0" + data, "x.gguf", read_gguf)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    config = AutoConfig.for_model(
        "llama", vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="1KB")
    return folder


def with_file(folder: Path, name: str, data: bytes) -> None:
    """Open a copy of the model in ``folder`` in which one file holds ``data``."""
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.iterdir():
            (Path(copy) / path.name).write_bytes(data if path.name == name else path.read_bytes())
        try:
            StreamedModel.open(open_checkpoint(copy)).load("")
        except FewbitError as error:
            assert str(error)


@SLOW
@given(edits=EDITS)
def test_index_bytes(sharded: Path, edits: list[Edit]) -> None:
    name = "model.safetensors.index.json"
    data = (sharded / name).read_bytes()
    with_file(sharded, name, mutated(data, edits, len(data)))


@SLOW
@given(key=st.integers(0, 100), value=JSON | st.sampled_from(["../x", "/etc/passwd", "model.safetensors", ".", "\0"]))
def test_index_values(sharded: Path, key: int, value: Any) -> None:
    name = "model.safetensors.index.json"
    index = json.loads((sharded / name).read_text())
    places = index["weight_map"]
    places[sorted(places)[key % len(places)]] = value
    with_file(sharded, name, json.dumps(index).encode())


@SLOW
@given(key=st.integers(0, 100), value=JSON | st.sampled_from([10**6, -1, 2**40, "x", [1] * 3]))
def test_configuration_values(sharded: Path, key: int, value: Any) -> None:
    config = json.loads((sharded / "config.json").read_text())
    config[sorted(config)[key % len(config)]] = value
    with_file(sharded, "config.json", json.dumps(config).encode())


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(32)
    layer = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd", *(f"blk.0.{part}" for part in layer)]:
        writer.add_tensor(f"{name}.weight", np.zeros((32, 32), dtype=np.float32))
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@SLOW
@given(edits=EDITS)
def test_gguf_models(gguf_model: bytes, edits: list[Edit]) -> None:
    """The configuration too, which transformers makes of the metadata."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(mutated(gguf_model, edits, 600))
        try:
            StreamedModel.open(open_checkpoint(path)).load("")
        except FewbitError as error:
            assert str(error)
