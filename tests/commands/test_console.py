# SPDX-License-Identifier: Apache-2.0
"""How figures are spelt, and JSON that any reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fewbit.commands.console import duration, figure, plain, size, table, write_json
from fewbit.errors import InputError


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (98362432, "93.8 MiB"), (3 << 40, "3.00 TiB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7800, "2 h 10 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_figure() -> None:
    assert [figure(x) for x in (4.25, 0.0, 1e-5, math.inf, None)] == ["4.250", "0.000", "1.00e-05", "not finite", "-"]


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
