# SPDX-License-Identifier: Apache-2.0
"""The two streams: results on stdout, everything else on stderr; and tables for both."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fewbit.containers import files
from fewbit.report.numbers import DASH

_PIPE_WIDTH = 160


def out() -> Console:
    """Results. Colours only on a terminal; a pipe gets lines of up to 160 characters."""
    return _console(stderr=False)


def err() -> Console:
    """Progress, notes, warnings and errors."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else int(os.environ.get("COLUMNS") or _PIPE_WIDTH)
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not stream.isatty(), emoji=False)


def results(json_target: str | None) -> Console:
    """Where tables go: stdout, unless ``--json -`` has taken it for JSON."""
    return err() if json_target == "-" else out()


def write_json(target: str | None, data: Any) -> None:
    """``data`` to ``target``: a file written whole or not at all, ``-`` for stdout, None for nowhere.

    Raises:
        InputError: the file cannot be written.
    """
    if target == "-":
        sys.stdout.write(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()
    elif target is not None:
        files.write_json(Path(target), plain(data))


def plain(data: Any) -> Any:
    """JSON has no NaN and no infinity: both become null; tuples become lists, paths strings."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Path):
        return str(data)
    return data


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Table:
    """Columns whose every cell is a number (or absent) are set flush right; None prints as a dash."""
    listed = [[DASH if cell is None else str(cell) for cell in row] for row in rows]
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, title_style="bold")
    for index, header in enumerate(headers):
        numeric = bool(listed) and all(_number(row[index]) for row in listed)
        made.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        made.add_row(*(cell.replace("[", "\\[") for cell in row))
    return made


def _number(cell: str) -> bool:
    return cell == DASH or cell[:1].isdigit() or (cell[:1] in "-+×" and cell[1:2].isdigit())
