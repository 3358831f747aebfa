# SPDX-License-Identifier: Apache-2.0
"""``bench/terms.py``: every row is measured, and multiplies by the weight that it says it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fewbit.kernels import native


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_the_command_writes_what_it_measured(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    words = ["--cached", "--shape", "96x256", "--batch", "1", "--batch", "9", "--seconds", "0.05", "--json", path]
    assert command("terms.py", *words)[0] == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["batch"] for row in rows} == {1, 9}
    assert all(row["seconds"] > 0 and row["of_stream"] > 0 for row in rows)
    names = {row["name"] for row in rows}
    assert names >= {"read stream", "sparse", "torch CSR", "int3/g128 + sparse", "low-rank signs", "torch float32"}
    errors = {(row["name"], row["x"]): row["error"] for row in rows if row["error"] is not None}
    # A product of signs adds up 256 and then 512 numbers; rounding to int8 costs half a step of 255 twice over.
    limit = {"float32": 768 * 2.0**-24, "int8/channel": 0.05}
    assert {key: error for key, error in errors.items() if not error <= limit[key[1]]} == {}
