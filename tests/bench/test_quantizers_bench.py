# SPDX-License-Identifier: Apache-2.0
"""``bench/quantizers.py``: our side of the table, which needs no peer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_our_rows_are_made_scored_and_not_made_again(
    tiny: Path, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    path, methods = tmp_path / "rows.json", ["gptq act-order", "rtn", "hqq"]
    there = {"package": "fewbit", "method": "hqq", "asked": 4, "bits": 4.6, "perplexity": 9.0, "kl_mean": 7.0}
    there |= {"kl_mean_stderr": 1.0, "top1_agreement": 0.5, "cpu_seconds": 1.0, "seconds": 1.0, "peak_rss_bytes": 1}
    path.write_text(json.dumps({"rows": [there]}))
    words = ["--peers", str(tmp_path), "--packages", "fewbit", "--bits", "4", "--context", "64", "--windows", "2"]
    words += ["--samples", "8", "--iters", "1", "--json", str(path), "--methods", *methods]
    code, said = command("quantizers.py", tiny, *words)
    assert code == 0, said
    kept, *made = json.loads(path.read_text())["rows"]
    assert kept == there and "7.0000" in said
    assert [row["method"] for row in made] == ["gptq act-order", "rtn"]
    for row in made:
        assert "failed" not in row and row["bits"] == pytest.approx(4 + (16 + 4) / 32)
        assert row["cpu_seconds"] > (row["loading_cpu_seconds"] or 0) and 0 < row["kl_mean"] < 0.1
    in_memory = [row["loading_cpu_seconds"] is not None for row in made]
    assert in_memory == [False, True]  # what looks at data goes from folder to folder, block by block
