# SPDX-License-Identifier: Apache-2.0
"""``fewbit eval``: measure a folder against its original; JSON, model card and HTML report beside it."""

from __future__ import annotations

from pathlib import Path

import fewbit
from fewbit.commands.console import err, results, write_json
from fewbit.commands.generate import use_threads
from fewbit.containers import manifest


def run(
    out: Path,
    reference: str | None,
    text: Path | None,
    context: int,
    max_tokens: int | None,
    threads: int | None,
    json_target: str | None,
    report: Path | None,
) -> None:
    """Measure, print the table, write ``evaluation.json``, ``README.md`` and ``report.html`` into ``out``."""
    use_threads(threads)
    manifest.read(out)
    raise NotImplementedError
