# SPDX-License-Identifier: Apache-2.0
"""The two streams: results on stdout, everything else on stderr; and tables for both."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fewbit.containers import files
from fewbit.core import given
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
        files.write_json(given.place("--json", target), plain(data))


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
    """Columns whose every cell is a number (or absent) are set flush right; None prints as a dash. On a narrow
    terminal names break after a dot or a stroke, where that is not enough after an underline, and not inside a word."""
    listed = [[DASH if cell is None else str(cell) for cell in row] for row in rows]
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, title_style="bold")
    for index, header in enumerate(headers):
        numeric = bool(listed) and all(_number(row[index]) for row in listed)
        made.add_column(_Cell(header), justify="right" if numeric else "left", overflow="fold")
    for row in listed:
        made.add_row(*map(_Cell, row))
    return made


class _Cell:
    """A text in as many lines as its column asks for."""

    def __init__(self, text: str) -> None:
        self.text, self.parts = text, re.split(r"(?<=[\s/])(?=\S)|(?<=\.)(?=\D)", text)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widths = [cell_len(part.rstrip()) for part in self.parts]
        return Measurement(max(widths), cell_len(self.text)).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def fits(part: str) -> bool:
            return cell_len(part.rstrip()) <= options.max_width

        lines = [""]
        for part in self.parts:
            for piece in [part] if fits(part) else re.split(r"(?<=[_=(+])(?=\w)", part):
                lines = [*lines[:-1], lines[-1] + piece] if fits(lines[-1] + piece) else [*lines, piece]
        yield Text("\n".join(line.rstrip() for line in lines if line), justify=options.justify, overflow="fold")


def _number(cell: str) -> bool:
    return cell == DASH or cell[:1].isdigit() or (cell[:1] in "-+×" and cell[1:2].isdigit())
