# SPDX-License-Identifier: Apache-2.0
"""What torch was told to use by default, or under autocast, changes no byte of a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import fewbit

Unusual = Callable[[], AbstractContextManager[None]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "billm": ("sign/g32", {}),
    "nanoquant": ("sign/channel", {"options": {"bits": 1.4, "iterations": 2, "rounds": 1}}),
    "gptq": ("int4/g32/asym", {"transforms": ["smooth"], "activation": "int8/static"}),
    "rtn": ("int3/g32/asym", {"tune": [{"name": "scales", "iters": 2, "batch": 2}]}),
}


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.fixture(scope="module")
def made(short: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """``made(method)``: the shards of the tiny model by that method."""

    def run(method: str) -> dict[str, bytes]:
        (format, more), out = CASES[method], tmp_path_factory.mktemp("made") / method
        short(out, format, method, samples=2, context=32, calibration_dtype="float32", force=True, **more)
        return shards(out)

    return run


@pytest.fixture(scope="module")
def expected(made: Callable[[str], dict[str, bytes]]) -> dict[str, dict[str, bytes]]:
    return {method: made(method) for method in CASES}


@pytest.mark.parametrize("method", CASES)
def test_shards_are_equal(
    method: str, made: Callable[[str], dict[str, bytes]], expected: dict[str, dict[str, bytes]], unusual: Unusual
) -> None:
    with unusual():
        assert made(method) == expected[method]


def test_facts_are_equal(tiny: Path, tmp_path: Path, unusual: Unusual) -> None:
    def collected(name: str) -> dict[str, bytes]:
        fewbit.collect(tiny, out=tmp_path / name, samples=2, context=32, calibration_dtype="float32")
        return shards(tmp_path / name)

    expected = collected("as usual")
    with unusual():
        assert collected("unusual") == expected
