# SPDX-License-Identifier: Apache-2.0
"""The before/after table and the comparison of several results, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fewbit.report import numbers as N
from fewbit.report.rows import Figures, closeness, rows, verdict

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


def compare_table(evaluations: Sequence[Figures]) -> Table:
    """One row a model, smallest first, under their originals; names are shortened to the last folder."""
    table = Table(header_style="bold", title_justify="left")
    table.add_column("model")
    for name in ("bits", "size", "perplexity", "KL mean", "KL 99.9 %", "top-1", "prefill", "decode", "memory"):
        table.add_column(name, justify="right")
    for reference in references(evaluations):
        table.add_row(*_cells(reference), style="dim")
    if references(evaluations):
        table.add_section()
    for evaluation in sorted(evaluations, key=lambda e: e["size_bytes"]):
        table.add_row(*_cells(evaluation))
    return table


def references(evaluations: Sequence[Figures]) -> list[Figures]:
    """The originals that these were compared to, each once."""
    found = {e["reference"]["model"]: e["reference"] for e in evaluations if e.get("reference")}
    return list(found.values())


def _cells(figures: Figures) -> list[Text]:
    kl = figures.get("kl_mean")
    tone = STYLES[closeness(kl)[1]] if kl else ""
    return [
        Text(short(figures["model"])),
        Text(N.significant(figures.get("bits_per_weight"))),
        Text(N.size(figures["size_bytes"])),
        Text(N.plus_minus(figures.get("perplexity"), figures.get("perplexity_stderr"))),
        Text(N.significant(kl), style=tone),
        Text(N.significant(figures.get("kl_p999"))),
        Text(N.percent(figures.get("top1_agreement"))),
        Text(N.significant(figures.get("prefill_tokens_per_s"))),
        Text(N.significant(figures.get("decode_tokens_per_s"))),
        Text(N.size(figures.get("peak_rss_bytes"))),
    ]


def short(model: str) -> str:
    """The last part of a path, which is what people call a model."""
    return Path(model).name or model
