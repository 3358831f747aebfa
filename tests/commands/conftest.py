# SPDX-License-Identifier: Apache-2.0
"""A way to run commands in this process, and the tiny model quantized through the command line, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fewbit.cli import app

Command = Callable[..., Result]
CALIBRATED = ("--samples", "4", "--context", "64")


@pytest.fixture(scope="session")
def command() -> Command:
    """``command("plan", model, ...)`` runs fewbit in this process; ``.stdout`` and ``.stderr`` are apart."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": None})

    return run


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


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that keep images sign them with a secret that lies in the user's cache, which is not that of tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
