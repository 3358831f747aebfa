# SPDX-License-Identifier: Apache-2.0
"""``bench/palettes.py``: our side of the table, which needs no peer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

LINE = re.compile(r"(\w+) +(\d) bits, (.*): (\d+\.\d\d) s, (-?\d+\.\d) layers, error (0\.\d{6})")


def test_our_side_says_what_a_table_takes_and_a_side_that_fails_says_why(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    words = ["--peers", tmp_path, "--shape", "64", "512", "--rows", "16", "--sides", "fewbit", "fast"]
    code, shown = command("palettes.py", *words)
    assert code == 0
    found = [match.groups() for match in map(LINE.fullmatch, shown.splitlines()) if match]
    assert [row[:3] for row in found] == [("fewbit", "4", "16 rows a table")]
    assert float(found[0][5]) == pytest.approx(0.0095, rel=0.02)  # Lloyd-Max, of a Gaussian
    failed = shown.splitlines()[1:]
    assert len(failed) == 1 and failed[0].startswith("fast") and "No module named 'coremltools'" in failed[0]
