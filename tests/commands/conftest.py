# SPDX-License-Identifier: Apache-2.0
"""A tiny random Llama with a byte tokenizer, quantized once through the command line, and a way to run commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from fewbit.cli import app

Command = Callable[..., Result]
CALIBRATED = ("--samples", "4", "--context", "64")


@pytest.fixture(scope="session")
def command() -> Command:
    """``command("plan", model, ...)`` runs fewbit in this process; ``.stdout`` and ``.stderr`` are apart."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama, 2 blocks, 64 wide, one token a byte, random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(tiny: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` at 4 bits by GPTQ, made by `fewbit quantize`."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    result = command("quantize", tiny, "--format", "int4/g32/asym", "--method", "gptq", *CALIBRATED, "-o", out)
    assert result.exit_code == 0, result.stderr
    return out


def loaded(path: Path) -> Any:
    """The JSON in ``path``."""
    return json.loads(path.read_text(encoding="utf-8"))
