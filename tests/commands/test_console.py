# SPDX-License-Identifier: Apache-2.0
"""Tables, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fewbit.commands.console import plain, table, write_json
from fewbit.errors import InputError


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(str(tmp_path / "a.json"), {"a": math.nan, "b": (1, Path("x")), "c": -math.inf})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1, "x"], "c": None}
    assert plain({1: 2}) == {"1": 2}


def test_json_to_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        write_json(str(tmp_path / "nowhere" / "a.json"), {})


def test_table_escapes_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from fewbit.commands.console import out

    out().print(table(("name", "n"), [("[red]x", None)]))
    text = capsys.readouterr().out
    assert "[red]x" in text
    assert "\x1b" not in text
