# SPDX-License-Identifier: Apache-2.0
"""``fewbit eval``: measure a folder against its original; JSON, model card and HTML report beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewbit
from fewbit.commands.console import err, results, write_json
from fewbit.commands.generate import prepare
from fewbit.containers import manifest
from fewbit.errors import UnsupportedError
from fewbit.measure.forward import Forward
from fewbit.report.table import evaluation_table
from fewbit.report.write import write_reports


def run(
    out: Path,
    reference: str | None,
    text: Path | None,
    context: int,
    max_tokens: int | None,
    decode_tokens: int,
    threads: int | None,
    activation: str | None,
    engine: str,
    json_target: str | None,
    report: Path | None,
) -> None:
    """Measure, print the table, write ``evaluation.json``, ``README.md`` and ``report.html`` into ``out``."""
    prepare(threads)
    manifest.read(out)
    forward = native(out, activation) if engine == "native" else None
    measured = measure(out, reference, text, context, max_tokens, decode_tokens, activation, forward)
    written = write_reports(out, measured, report)
    write_json(json_target, measured)
    results(json_target).print(evaluation_table(measured))
    err().print(f"written: {', '.join(str(path) for path in written)}", markup=False)


def measure(
    out: Path,
    reference: str | None,
    text: Path | None,
    context: int,
    max_tokens: int | None,
    decode_tokens: int,
    activation: str | None = None,
    forward: Forward | None = None,
) -> dict[str, Any]:
    """Plain data of :func:`fewbit.evaluate`; what it is at is shown on stderr."""
    console = err()
    with console.status("opening") as status:
        shown: set[str] = set()

        def progress(stage: str, done: int, total: int) -> None:
            status.update(f"{stage} {done}/{total}")
            if not console.is_terminal and stage not in shown:
                console.print(stage, markup=False)
            shown.add(stage)

        found = fewbit.evaluate(
            out, reference, text, context, max_tokens, decode_tokens, progress, activation=activation, forward=forward
        )
        return found.to_json()


def native(out: Path, activation: str | None) -> Forward | None:
    """The native runtime on ``out``; None, and why on stderr, where it cannot run it."""
    from fewbit.decode.forward import native_forward

    try:
        forward = native_forward(out, activation)
    except UnsupportedError as error:
        err().print(f"logits by transformers: {error}", markup=False)
        return None
    err().print(f"logits by {forward.about}", markup=False)
    return forward
