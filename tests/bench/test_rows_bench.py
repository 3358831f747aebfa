# SPDX-License-Identifier: Apache-2.0
"""``bench/rows.py``: every row that this machine chooses is beside the one that would run without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fewbit import formats, kernels
from fewbit.kernels import native


@pytest.mark.skipif(set(native.isas()) <= {"serial"}, reason="no row of an instruction set here")
def test_each_row_is_timed_beside_the_next_that_takes_the_same(
    command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    kept = tmp_path / "rows.json"
    code, shown = command("rows.py", "--shape", "64x128", "--seconds", "0", "--json", kept)
    assert code == 0 and "without it" in shown
    found = json.loads(kept.read_text())["rows"]
    assert len(found) > 20 and {"float32", "int8/channel/sym", "sign/channel"} <= {row["x"] for row in found}
    for row in found:
        activation = None if row["x"] == "float32" else formats.parse(row["x"])
        best = kernels.choose(formats.parse(row["weights"]), (64, 128), activation=activation).name
        assert row["row"] == best != row["without"]
        assert all(ours > 0 and other > 0 for ours, other in row["seconds"].values())
