# SPDX-License-Identifier: Apache-2.0
"""The before/after table, for a terminal; and what results are called in every report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fewbit.report.rows import Figures, rows, verdict

STYLES = {"good": "green", "bad": "bold red", "even": "yellow", "plain": ""}


def evaluation_table(evaluation: Figures) -> Table:
    """Original, quantized, and what that means, one row a figure; the verdict is the caption."""
    found = verdict(evaluation)
    caption = Text(found.headline, style=STYLES[found.tone])
    for warning in found.warnings:
        caption.append(f"\n{warning}", style=STYLES["bad"])
    title = escape(short(evaluation["model"]))
    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left", header_style="bold")
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("quantized", justify="right")
    table.add_column("")
    group = ""
    for row in rows(evaluation):
        if group not in ("", row.group):
            table.add_section()
        group = row.group
        table.add_row(Text(row.label), Text(row.before), Text(row.after), Text(row.change, STYLES[row.tone]))
    return table


def references(evaluations: Sequence[Figures]) -> list[Figures]:
    """The originals that these were compared to, each once."""
    found = {e["reference"]["model"]: e["reference"] for e in evaluations if e.get("reference")}
    return list(found.values())


def short(model: str) -> str:
    """The last part of a path, which is what people call a model."""
    return Path(model).name or model
