# SPDX-License-Identifier: Apache-2.0
"""What a run that cannot continue says of what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.errors import ResumeError
from fewbit.run.journal import compare


def test_changes_are_told_by_field_and_where_they_begin() -> None:
    long = "a" * 100
    before = {"model": {"weights": "f" * 64, "config": "c"}, "recipe": f"{long}int4{long}", "seed": 0}
    now = {"model": {"weights": "0" * 64, "config": "c"}, "recipe": f"{long}int3{long}", "seed": 0}
    with pytest.raises(ResumeError) as caught:
        compare(before, now, Path("out"))
    weights, recipe = caught.value.found.split(", ")
    assert weights.startswith("model weights was ffff") and "... and is 0000" in weights and weights.endswith("...")
    assert "aint4a" in recipe and "aint3a" in recipe and len(recipe) < 200
    assert "{" not in caught.value.found
    compare(now, now, Path("out"))
