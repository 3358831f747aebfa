# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama with a byte tokenizer, shared by everything that needs a whole model; and threads of torch that
wait asleep, since those that spin take the core of the test that runs beside: a third of all processor time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded, which is later


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The C++ test programs run for minutes: last, one worker would wait for the other; first, for their compiler. So
    they are a quarter, a half and three quarters down the list, of which each of two workers begins with one half."""
    programs = [item for item in items if item.path.name == "test_program.py"]
    others = [item for item in items if item.path.name != "test_program.py"]
    parts = len(programs) + 1
    for number in range(len(programs), 0, -1):
        others.insert(len(others) * number // parts, programs[number - 1])
    items[:] = others


def save_byte_tokenizer(folder: Path) -> int:
    """Write a tokenizer with one token a byte into ``folder``; returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return len(symbols)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch, where tensors are small and threads would wait for one another, or bits must not differ."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=("float64", "bfloat16", "autocast", "device"))
def unusual(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """``with unusual():`` torch is set as a user's program may have it, each way in turn."""
    import torch

    @contextmanager
    def around() -> Iterator[None]:
        with ExitStack() as stack:
            if request.param == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            elif request.param == "device":
                stack.callback(torch.set_default_device, None)
                torch.set_default_device("meta")
            else:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(getattr(torch, request.param))
            yield

    return around


@pytest.fixture(scope="session")
def byte_tokenizer() -> object:
    """The function that writes the tokenizer: ``byte_tokenizer(folder) -> vocabulary size``."""
    return save_byte_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama, 2 blocks, 64 wide, one token a byte, random weights, tied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = save_byte_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models() -> Any:
    """The module that makes tiny models of many families."""
    source = Path(__file__).parent / "model" / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", source)
    assert spec is not None and spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return models


@pytest.fixture
def tiny_family(tmp_path: Path, tiny_models: Any) -> Callable[[str], Path]:
    """``tiny_family(name)``: the folder of a random two-block model of that family, with the byte tokenizer."""

    def make(name: str) -> Path:
        folder = tmp_path / "model"
        tiny_models.make(name, folder, vocab_size=save_byte_tokenizer(folder))
        return folder

    return make
