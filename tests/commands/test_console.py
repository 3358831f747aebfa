# SPDX-License-Identifier: Apache-2.0
"""Tables, and JSON that any reader takes."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fewbit.commands.console import plain, table, write_json
from fewbit.errors import InputError


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(str(tmp_path / "a.json"), {"a": math.nan, "b": (1, Path("x")), "c": -math.inf})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1, "x"], "c": None}
    assert plain({1: 2}) == {"1": 2}


def test_json_to_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        write_json(str(tmp_path / "nowhere" / "a.json"), {})


@pytest.mark.parametrize(("width", "shown"), [(19, ["a.0.", "down_proj"]), (17, ["a.0.", "down_", "proj"])])
def test_names_break_between_their_parts(width: int, shown: list[str]) -> None:
    """After dots and spaces; inside of a part only where it is wider than its column; and nothing is left out."""
    file = io.StringIO()
    console = Console(width=width, file=file)
    console.print(table(("layer", "n"), [("a.0.down_proj", 1.25), ("x" * 60, 3)]))
    rows = [row for row in file.getvalue().splitlines() if row.strip()][2:]
    assert max(map(len, rows)) <= width and [row.split()[0] for row in rows][: len(shown)] == shown
    assert "1.25" in rows[0] and "".join(rows).count("x") == 60


def test_table_escapes_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from fewbit.commands.console import out

    out().print(table(("name", "n"), [("[red]x", None)]))
    text = capsys.readouterr().out
    assert "[red]x" in text
    assert "\x1b" not in text


def test_commands_whose_memory_is_counted_print_without_rich() -> None:
    code = (
        "import sys; from fewbit import cli; from fewbit.commands import generate, serve; print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
