# SPDX-License-Identifier: Apache-2.0
"""Evaluation through the native runtime: the figures of transformers, from the logits of every token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.decode.forward import native_forward
from fewbit.decode.native_engine import NativeEngine
from fewbit.errors import InputError, SpecError
from fewbit.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

IDS = torch.randint(3, 67, (320,), generator=torch.Generator().manual_seed(5))


def test_every_logit_is_what_a_prompt_of_its_length_gives(tiny_family: Callable[[str], Path]) -> None:
    """300 tokens: three chunks; blocks of int8 keys close on the way."""
    folder = tiny_family("gemma2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    engine = NativeEngine.load(folder, None, "int8", 2, None, 1)
    tokens = IDS[:300].tolist()
    every, one = engine.every_logit(tokens), engine.open()
    assert every.shape == (300, engine.vocab_size)
    for at in range(300):
        assert torch.equal(engine.feed([(one, tokens[at : at + 1])])[0], every[at])
    with pytest.raises(InputError):
        engine.every_logit([engine.vocab_size])
    assert engine.open() == one + 1  # a text that failed leaves no sequence open


def test_figures_are_those_of_transformers(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    """Quantized weights are the same numbers; sums differ by float32 rounding, some 2^-22 of logits of about 1 (KL: its
    square and what rounding does to it, below 2e-7), and keys in float16 by 2^-11 of each, on average far less."""
    original = tiny_family("llama")
    out = fewbit.quantize(original, "int2/g32", force=True, out=tmp_path / "out").path
    figures = [
        fewbit.evaluate(out, original, IDS, context=64, decode_tokens=0, forward=forward)
        for forward in (None, native_forward(out, kv="float32"), native_forward(out))
    ]
    expected, exact, usual = figures
    assert expected.protocol["engine"] == "transformers" and "float16" in usual.protocol["engine"]
    assert exact.perplexity == pytest.approx(expected.perplexity, rel=2e-6)
    assert exact.kl_mean == pytest.approx(expected.kl_mean, abs=2e-7) and expected.kl_mean > 1e-5
    assert usual.perplexity == pytest.approx(expected.perplexity, rel=2e-4)
    for name in ("size_bytes", "parameters", "bits_per_weight", "perplexity_stderr"):
        assert getattr(exact, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert exact.reference is not None and exact.reference.perplexity == expected.reference.perplexity


def test_what_cannot_be_measured_is_refused(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("llama")
    with pytest.raises(InputError, match="fewbit folder"):
        fewbit.evaluate(folder, text=IDS, context=64, decode_tokens=0, forward=native_forward(folder))
    with pytest.raises(SpecError, match="one of"):
        native_forward(folder, kv="int9")
