# SPDX-License-Identifier: Apache-2.0
"""Short runs on the tiny model; ``tests/oracle`` is importable as ``oracle``."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fewbit
from fewbit import calibrate
from fewbit.run import PROBE

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

SHORT: dict[str, Any] = {"samples": 8, "context": 64}


@pytest.fixture(scope="session")
def short(tiny: Path) -> Callable[..., Any]:
    """``short(out, format, method, **more)``: quantize the tiny model with little data."""

    def run(out: Path, format: str = "int4/g32/asym", method: str = "gptq", **more: Any) -> Any:
        return fewbit.quantize(tiny, format, method=method, out=out, **{**SHORT, **more})

    return run


@pytest.fixture(scope="session")
def probe_kl(tiny: Path) -> Callable[[Any], float]:
    """``probe_kl(model)``: mean KL of the tiny model to ``model``, on the tokens that a run is checked on: every second
    one, from window to window the others."""

    def of(model: Any) -> float:
        probe = calibrate.probe(AutoTokenizer.from_pretrained(tiny), *PROBE)
        with torch.no_grad():
            theirs, ours = (
                each(probe).logits[:, :-1].double().log_softmax(-1)
                for each in (AutoModelForCausalLM.from_pretrained(tiny), model)
            )
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        return float((kl[::2, ::2].sum() + kl[1::2, 1::2].sum()) / (kl[::2, ::2].numel() + kl[1::2, 1::2].numel()))

    return of


@pytest.fixture(scope="session")
def hashes() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file below a folder."""

    def of(folder: Path) -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of


@pytest.fixture
def recorded(tmp_path: Path, byte_tokenizer: Callable[[Path], int]) -> Callable[..., Any]:
    """``recorded(golden, **shape)``: the Llama of one block, 64 wide, that a script of ``tests/golden`` recorded, its
    windows as ``tmp_path / "text.txt"``, and itself in ``tmp_path / "model"``; with all that was recorded, and what
    loading its weights says of keys."""

    def load(golden: Path, **shape: int) -> Any:
        with np.load(golden, allow_pickle=False) as data:
            saved = {name: torch.from_numpy(data[name]) for name in data.files}
        folder = tmp_path / "model"
        config = LlamaConfig(
            vocab_size=byte_tokenizer(folder),
            hidden_size=64,
            num_hidden_layers=1,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
            **shape,
        )
        model = LlamaForCausalLM(config).float().eval()
        weights = {name[7:]: values.float() for name, values in saved.items() if name.startswith("weight.")}
        keys = model.load_state_dict(weights, strict=False)
        model.save_pretrained(folder)
        letters = (chr(token - 2 + ord("!")) for token in saved["ids"].long().flatten().tolist())
        (tmp_path / "text.txt").write_text("".join(letters))
        return model, saved, keys

    return load
