# SPDX-License-Identifier: Apache-2.0
"""Folders that fewbit wrote: the native runtime gives what transformers gives on the same codes, in every format, with
rounded and with rewritten inputs, and for experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.decode import open_engine
from fewbit.decode.transformers_engine import TransformersEngine
from fewbit.decode.weights import codes_of
from fewbit.kernels import native
from fewbit.layouts import dense

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

TOKENS = [5, 9, 3, 44, 7, 30, 12, 60, 8, 21, 33, 17, 2, 50]


def both(folder: Path, activation: str | None, exact: bool = True) -> None:
    """Logits after some tokens, then after one more, in either engine. Not ``exact``: where inputs are rounded, one
    that lies between two codes may fall to the other one, so that some logits differ by some of their steps."""
    engine = open_engine(folder, kv="float32", activation=activation)
    assert engine.name == "native", engine.why
    other = TransformersEngine.load(folder, None, activation, 8, None, None)
    ours, theirs = engine.open(), other.open()
    for part in (TOKENS, TOKENS[:1]):
        found, expected = engine.feed([(ours, part)]), other.feed([(theirs, part)])
        largest = float(expected.abs().max())
        error = (found - expected).abs()
        assert float(error.max()) <= (2e-5 if exact else 0.05) * largest
        assert float(error.median()) <= (2e-5 if exact else 0.01) * largest


def quantized(source: Path, out: Path, format: str, **options: Any) -> Path:
    fewbit.quantize(source, format, out=out, **{"force": True, "samples": 4, "context": 32, **options})
    return out


@pytest.mark.parametrize(
    "format",
    [
        "int8/g32",
        "int4/g32",
        "int4/g32/asym",
        "int3/g32",
        "int2/g32/asym",
        "sign/g32",
        "ternary/g32",
        "nf4/g32",
        "palette3/rows32",
    ],
)
def test_formats(tiny: Path, tmp_path: Path, format: str) -> None:
    both(quantized(tiny, tmp_path / "out", format), None)


@pytest.mark.parametrize("activation", ["int8/channel", "int8/g32"])
def test_rounded_inputs(tiny: Path, tmp_path: Path, activation: str) -> None:
    both(quantized(tiny, tmp_path / "out", "int4/g32"), activation, exact=False)


def test_inputs_that_were_quantized_with_the_weights(tiny: Path, tmp_path: Path) -> None:
    both(quantized(tiny, tmp_path / "out", "W8A8", transforms=["smooth", "rotate"]), None, exact=False)


SUMS = {
    "nanoquant": ("sign/channel", {"bits": 1.5, "iterations": 10, "rounds": 2}),
    "billm": ("sign/g32", {}),
    "arb": ("sign/g32", {}),
    "ptq161": ("int1/channel/min", {}),
    "laq": ("int3/g8/asym", {"mean_bits": 6.0}),
    "squeezellm": ("palette3/rows16", {}),
    "vptq": (
        "vector4x4",
        {
            "outliers": 0.1,
            "outlier_bits": 4,
            "outlier_residual_bits": 3,
            "norm": "both",
            "restarts": 1,
            "rounds": 1,
        },
    ),
}


@pytest.mark.parametrize("method", list(SUMS))
def test_sums_of_terms(tiny: Path, tmp_path: Path, method: str) -> None:
    """The logits of transformers, prompts cut anywhere, and the same greedy text."""
    format, options = SUMS[method]
    folder = quantized(tiny, tmp_path / "out", format, method=method, options=options)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    assert sum("terms" in module for module in entry.values()) == 14
    both(folder, None)
    both(folder, "int8/channel", exact=False)
    engine, other = open_engine(folder, kv="float32"), TransformersEngine.load(folder, None, None, 8, None, None)
    whole, cut, theirs = engine.open(), engine.open(), other.open()
    logits = engine.feed([(whole, TOKENS)])
    for piece in (TOKENS[:1], TOKENS[1:10], TOKENS[10:]):
        last = engine.feed([(cut, piece)])
    assert torch.equal(last, logits)
    expected = other.feed([(theirs, TOKENS)])
    for _ in range(12):
        token = int(logits.argmax())
        assert token == int(expected.argmax())
        logits, expected = engine.feed([(whole, [token])]), other.feed([(theirs, [token])])


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W4A8_STATIC", "W4A4", "LLM_INT8"])
def test_schemes(tiny: Path, tmp_path: Path, scheme: str) -> None:
    both(quantized(tiny, tmp_path / "out", scheme, head="float"), None, exact=False)


def test_tables_of_rows_that_are_also_looked_up(tiny: Path, tmp_path: Path) -> None:
    folder = quantized(tiny, tmp_path / "out", "palette3/row", head="palette4/row")
    both(folder, None)
    both(folder, "int8/channel", exact=False)


@pytest.mark.parametrize("transform", ["rotate", "smooth"])
def test_rewritten_inputs(tiny: Path, tmp_path: Path, transform: str) -> None:
    both(quantized(tiny, tmp_path / "out", "int4/g32/asym", transforms=[transform]), None)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mixtral", "smollm3", "qwen2", "qwen2-moe", "qwen3-moe"])
def test_families(tiny_family: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    both(quantized(tiny_family(family), tmp_path / "out", "int4/g8"), None)


@pytest.mark.parametrize("head", ["float", "int4/g32", "nf4/g32", "palette6/rows16"])
def test_heads(tiny: Path, tmp_path: Path, head: str) -> None:
    both(quantized(tiny, tmp_path / "out", "int4/g32", head=head), None)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_codes_of_a_file(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    format = fewbit.formats.parse(f"int{bits}/channel") if bits > 1 else fewbit.formats.parse("sign/channel")
    assert torch.equal(codes_of(dense.pack_rows(codes, bits), (5, columns), format), codes)
