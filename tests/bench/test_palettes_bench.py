# SPDX-License-Identifier: Apache-2.0
"""``bench/palettes.py``: our side of the table, which needs no peer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
LINE = re.compile(r"(\w+) +(\d) bits, (.*): (\d+\.\d\d) s, (-?\d+\.\d) layers, error (0\.\d{6})")


def test_our_side_says_what_a_table_takes_and_a_side_that_fails_says_why(tmp_path: Path) -> None:
    words = ["--peers", str(tmp_path), "--shape", "64", "512", "--rows", "16", "--sides", "fewbit", "fast"]
    command = [sys.executable, str(BENCH / "palettes.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [match.groups() for match in map(LINE.fullmatch, done.stdout.splitlines()) if match]
    assert [row[:3] for row in found] == [("fewbit", "4", "16 rows a table")]
    assert float(found[0][5]) == pytest.approx(0.0095, rel=0.02)  # Lloyd-Max, of a Gaussian
    failed = done.stdout.splitlines()[1:]
    assert len(failed) == 1 and failed[0].startswith("fast") and "No module named 'coremltools'" in failed[0]
