# SPDX-License-Identifier: Apache-2.0
"""The reports that lie beside a quantized model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbit.containers import manifest as M
from fewbit.containers.files import write_bytes, write_json
from fewbit.report.card import card
from fewbit.report.html import compare_page, page
from fewbit.report.rows import Figures

EVALUATION, CARD, PAGE = "evaluation.json", "README.md", "report.html"


def write_reports(folder: str | Path, evaluation: Figures | None, html: str | Path | None = None) -> list[Path]:
    """Write ``evaluation.json``, ``README.md`` and ``report.html`` into a fewbit folder, each atomically.

    Args:
        evaluation: ``Evaluation.to_json()``; None writes the card and the page from the manifest alone.
        html: where the page goes instead of ``folder/report.html``.

    Raises:
        InputError: no fewbit folder, or it is not writable.
    """
    folder = Path(folder)
    manifest = M.read(folder)
    written = []
    if evaluation is not None:
        write_json(folder / EVALUATION, dict(evaluation))
        written.append(folder / EVALUATION)
    write_bytes(folder / CARD, card(manifest, evaluation, _source_card(manifest)).encode())
    target = Path(html) if html is not None else folder / PAGE
    write_bytes(target, page(manifest, evaluation).encode())
    return [*written, folder / CARD, target]


def write_comparison(path: str | Path, evaluations: Sequence[Figures]) -> Path:
    """The comparison page of several ``Evaluation.to_json()`` at ``path``."""
    write_bytes(Path(path), compare_page(evaluations).encode())
    return Path(path)


def _source_card(manifest: Mapping[str, Any]) -> str | None:
    """README of the original, if that is a local folder that has one."""
    path = Path(str(manifest["source"].get("path", ""))) / "README.md"
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None
