# SPDX-License-Identifier: Apache-2.0
"""A text's logits are the same bits alone and in company, whatever the company, and however its prompt is cut into
calls: with every family of kernels, float and rounded inputs, experts, and codes for keys and values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.decode import Engine, open_engine
from fewbit.kernels import native
from fewbit.recipe import Recipe, Rule

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")

SITES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SITES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FORMATS = {
    "any inputs": (
        ("sign/g32", "int2/g32/asym", "int3/g32", "int4/g32/asym", "int5/g32", "int6/g32", "int7/channel"),
        ("int8/g32", "ternary/g32", "nf4/g32", "palette1", "palette2", "palette3/rows16", "mxfp4"),
    ),
    "float inputs": (
        ("vector4x6", "int4/g8", "palette8", "int4/g32x8/asym/s6", "pot5/g64", "int8/g16", "int2/g8"),
        ("float",) * len(SITES),
    ),
}
"""Of the sites of either block, by what their kernels take."""
STEPS = 3


def numbers(seed: int, count: int) -> list[int]:
    return [int(token) for token in torch.randint(2, 67, (count,), generator=torch.Generator().manual_seed(seed))]


PROMPT = numbers(1, 150)
OTHERS = [numbers(2 + place, count) for place, count in enumerate((1, 2, 9, 33, 64, 140, 5))]


@pytest.fixture(scope="module")
def mixed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny Llama with another format at each site."""

    @functools.cache
    def make(inputs: str) -> Path:
        rules = [
            Rule(f"model.layers.{block}.{site}", format)
            for block, some in enumerate(FORMATS[inputs])
            for site, format in zip(SITES, some, strict=True)
        ]
        recipe = Recipe((*rules, Rule("kind:head", "int8/g64")))
        out = tmp_path_factory.mktemp("mixed") / "out"
        fewbit.quantize(tiny, recipe, out=out, force=True, samples=4, context=32)
        return out

    return make


def logits_of(engine: Engine, others: list[list[int]], chunk: int) -> torch.Tensor:
    """After the prompt, read ``chunk`` tokens at a time beside one more of ``others`` each time, and after each of some
    tokens, the likeliest ones, (1 + STEPS, vocabulary)."""
    prompt, text = PROMPT[: engine.context - STEPS], engine.open()
    beside = [(engine.open(), other[: engine.context - STEPS]) for other in others]
    pieces = [prompt[begin : begin + chunk] for begin in range(0, len(prompt), chunk)]
    for place, piece in enumerate(pieces):
        joining = beside[place:] if piece is pieces[-1] else beside[place : place + 1]
        logits = engine.feed([*joining, (text, piece)])[-1]
    found = [logits]
    for _ in range(STEPS):
        logits = engine.feed([(text, [int(logits.argmax())]), *((other, [5]) for other, _ in beside)])[0]
        found.append(logits)
    for sequence in (text, *(other for other, _ in beside)):
        engine.close(sequence)
    return torch.stack(found)


def check(folder: Path, activation: str | None = None, kv: str = "float16") -> None:
    engine = open_engine(folder, activation=activation, kv=kv, sequences=9)
    assert engine.name == "native", engine.why
    alone = logits_of(engine, [], len(PROMPT))
    assert len(alone.unique(dim=0)) == 1 + STEPS
    for count in (1, 2, 7):
        assert torch.equal(logits_of(engine, OTHERS[:count], len(PROMPT)), alone), f"{count} others"
    for chunk in (1, 2, 3, 7, 64):
        assert torch.equal(logits_of(engine, [], chunk), alone), f"chunks of {chunk}"
    assert torch.equal(logits_of(engine, OTHERS, 40), alone)


@pytest.mark.parametrize("kv", ["float16", "int8"])
@pytest.mark.parametrize("activation", [None, "int8/channel", "int8/g32"])
def test_every_family_of_kernels(mixed: Callable[[str], Path], activation: str | None, kv: str) -> None:
    check(mixed("any inputs"), activation, kv)


def test_kernels_that_leave_inputs_float(mixed: Callable[[str], Path]) -> None:
    check(mixed("float inputs"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2-moe"])
def test_floats_windows_and_experts(tiny_family: Callable[[str], Path], family: str) -> None:
    check(tiny_family(family))
