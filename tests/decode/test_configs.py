# SPDX-License-Identifier: Apache-2.0
"""Configurations and tokenizers that are read without transformers are those that transformers reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer

from fewbit.decode import configs
from fewbit.decode.configs import config_of
from fewbit.decode.families import Shape, shape_of
from fewbit.kernels import native
from fewbit.model.tokenizer import FileTokenizer, open_tokenizer

FAMILIES = ["llama", "llama-tied", "mistral", "ministral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3"]
FAMILIES += ["mixtral", "qwen2-moe", "qwen3-moe"]


def same(found: Shape, expected: Shape) -> None:
    assert replace(found, ropes=()) == replace(expected, ropes=())
    for ours, theirs in zip(found.ropes, expected.ropes, strict=True):
        assert ours.scale == theirs.scale
        torch.testing.assert_close(ours.frequencies, theirs.frequencies, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_configuration_is_taken_as_it_is(tiny_family: Callable[[str], Path], family: str) -> None:
    folder = tiny_family(family)
    assert configs._whole(json.loads((folder / "config.json").read_text()))
    same(shape_of(config_of(folder)), shape_of(AutoConfig.from_pretrained(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_stated_is_asked_of_transformers(tiny_family: Callable[[str], Path], family: str) -> None:
    """Each value by itself is left out; what remains means what transformers says."""
    folder = tiny_family(family)
    whole = json.loads((folder / "config.json").read_text())
    row = configs.family_of(whole["model_type"])
    assert row is not None
    for name in {"head_dim", "num_key_value_heads", "rms_norm_eps", *row.stated} & whole.keys():
        left = {key: value for key, value in whole.items() if key != name}
        assert not configs._whole(left)
    for name, junk in (
        ("hidden_size", "64"),
        ("rms_norm_eps", None),
        ("dtype", "int3"),
        ("rope_parameters", []),
        ("layer_types", [0]),
    ):
        assert not configs._whole(whole | {name: junk})
    if "no_rope_layers" in row.stated:
        for junk in (None, [1]):
            assert not configs._whole(whole | {"no_rope_layers": junk})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
)
def test_slowed_rotary_embeddings(tiny_family: Callable[[str], Path], rope: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = tiny_family("llama")
    whole = json.loads((folder / "config.json").read_text())
    whole |= {"rope_parameters": {"rope_theta": 10000.0, **rope}, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(whole))
    expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](AutoConfig.from_pretrained(folder), None)
    (found,) = shape_of(config_of(folder)).ropes
    assert found.scale == scale and len(found.frequencies) == 32
    torch.testing.assert_close(found.frequencies, expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[Path], int]) -> tuple[FileTokenizer, Any]:
    """A tokenizer read either way."""
    folder = tmp_path_factory.mktemp("words")
    byte_tokenizer(folder)
    ours = open_tokenizer(folder)
    assert ours is not None
    return ours, AutoTokenizer.from_pretrained(folder)


@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a </s><s>é")), max_size=40))
@settings(deadline=None, max_examples=60)
def test_tokens_are_those_of_transformers(both: tuple[FileTokenizer, Any], text: str) -> None:
    say_the_same(*both, text)


def say_the_same(ours: FileTokenizer, theirs: Any, text: str) -> None:
    for special in (False, True):
        tokens = ours(text, add_special_tokens=special)["input_ids"]
        assert tokens == theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.decode(tokens, skip_special_tokens=special) == theirs.decode(
            tokens, skip_special_tokens=special, clean_up_tokenization_spaces=False
        )
    assert (ours.eos_token_id, ours.special_tokens_map) == (theirs.eos_token_id, theirs.special_tokens_map)
    assert len(ours) == len(theirs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer as those of Llama are: bytes for what has no token of its own."""
    folder = tmp_path_factory.mktemp("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"\u2581abc", "ab", "\u2581a", "\u2581ab"]
    vocab, merges = (
        {token: place for place, token in enumerate(tokens)},
        [("a", "b"), ("\u2581", "a"), ("\u2581", "ab")],
    )
    LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True).save_pretrained(folder)
    beside = folder / "tokenizer_config.json"
    told = json.loads(beside.read_text())
    told.pop("add_bos_token", None)  # the file has it
    beside.write_text(json.dumps(told))
    file = folder / "tokenizer.json"  # older ones put a space after special tokens too, which the class does not
    file.write_text(file.read_text().replace('"first"', '"always"'))
    return folder


@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("abc </s><s>é")), max_size=40))
@example("a</s>ab<s> ab")
@settings(deadline=None, max_examples=60)
def test_tokens_of_llama_are_those_of_transformers(llama: Path, text: str) -> None:
    ours, theirs = open_tokenizer(llama), AutoTokenizer.from_pretrained(llama)
    assert ours is not None
    say_the_same(ours, theirs, text)
    assert ours.bos_token_id == theirs.bos_token_id == 1


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("normalizer", {"type": "NFC"}),
        ("decoder", {"type": "Fuse"}),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}),
        ("model", {"byte_fallback": False}),
        ("config", {"legacy": True}),
    ],
)
def test_a_llama_tokenizer_that_is_none_is_left_to_transformers(
    tmp_path: Path, llama: Path, part: str, change: dict[str, Any]
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    file = tmp_path / ("tokenizer_config.json" if part == "config" else "tokenizer.json")
    found = json.loads(file.read_text())
    if part == "config":
        found |= change
    else:
        found[part] = {**found["model"], **change} if part == "model" else change
    file.write_text(json.dumps(found))
    assert open_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"eos_token": "<nowhere>"},
        {"extra_special_tokens": ["<nowhere>"]},
        {"bos_token": {"content": "<s>"}},
        {"chat_template": [{"name": "default", "template": "{{ 1 }}"}]},
    ],
)
def test_what_transformers_would_change_is_left_to_it(
    tmp_path: Path, byte_tokenizer: Callable[[Path], int], change: dict[str, Any]
) -> None:
    byte_tokenizer(tmp_path)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    assert open_tokenizer(tmp_path) is None


@pytest.mark.skipif(not native.available(), reason="no native module here")
def test_a_text_is_written_without_transformers(tiny: Path) -> None:
    code = (
        "import sys, fewbit; sys.path[:0] = []; text = fewbit.generate(sys.argv[1], [{'role': 'user', 'content': 'hi'}]"
        " if len(sys.argv) > 2 else 'hi'); print([name for name in ('transformers', 'sympy', 'scipy') if name in"
        " sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
