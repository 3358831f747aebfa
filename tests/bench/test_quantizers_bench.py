# SPDX-License-Identifier: Apache-2.0
"""``bench/quantizers.py``: our side of the table, which needs no peer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_our_rows_are_made_scored_and_not_made_again(tiny: Path, tmp_path: Path) -> None:
    path, methods = tmp_path / "rows.json", ["gptq act-order"]
    words = ["--peers", str(tmp_path), "--packages", "fewbit", "--bits", "4", "--context", "64", "--windows", "2"]
    words += ["--samples", "8", "--iters", "1", "--json", str(path), "--methods", *methods]
    command = [sys.executable, str(BENCH / "quantizers.py"), str(tiny), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row.get("failed") for name, row in rows.items()} == dict.fromkeys(methods)
    for row in rows.values():
        assert row["bits"] == pytest.approx(4 + (16 + 4) / 32)
        assert row["cpu_seconds"] > 0 and 0 < row["kl_mean"] < 0.1
    path.write_text(json.dumps({"rows": [{**rows["gptq act-order"], "kl_mean": 7.0}]}))
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "7.0000" in again.stdout
