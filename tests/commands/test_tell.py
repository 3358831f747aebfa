# SPDX-License-Identifier: Apache-2.0
"""``fewbit tell``, and ``fewbit quantize`` on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Command = Callable[..., Result]


def test_texts_are_told_and_learned_from(tiny: Path, command: Command, tmp_path: Path) -> None:
    told, again, other = (tmp_path / f"{name}.jsonl" for name in ("told", "again", "other"))
    size = ("--samples", "6", "--context", "48", "--batch", "4")
    result = command("tell", tiny, "-o", told, *size)
    assert result.exit_code == 0, result.stderr
    assert "6 texts of 48 tokens" in result.stdout and "6 of 6 texts told" in result.stderr
    texts = [json.loads(line)["text"] for line in told.read_text().splitlines()]
    assert len(texts) == 6 and len(set(texts)) == 6
    assert command("tell", tiny, "-o", again, *size, "--threads", "2").exit_code == 0
    assert command("tell", tiny, "-o", other, *size, "--seed", "1").exit_code == 0
    assert again.read_bytes() == told.read_bytes() != other.read_bytes()
    result = command("tell", tiny, "-o", told, *size)
    assert result.exit_code == 3 and "--force" in result.stderr
    data = ("--calibration", told, "--samples", "4", "--context", "16")
    result = command("quantize", tiny, "-o", tmp_path / "out", "-f", "int4/g32", "-m", "gptq", *data)
    assert result.exit_code == 0, result.stderr
