# SPDX-License-Identifier: Apache-2.0
"""``fewbit calibrate``: collect facts once, or add up those of several texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.commands.console import err, results, table, write_json
from fewbit.commands.progress import Renderer
from fewbit.model.checkpoint import open_checkpoint
from fewbit.report import numbers as N
from fewbit.run.collecting import collect, merge
from fewbit.run.facts import KeptFacts
from fewbit.run.opening import model_hashes


def run(model: str, out: Path, merged: list[Path], json_target: str | None, **arguments: Any) -> None:
    """Print what came out; ``arguments`` are those of :func:`fewbit.collect`.

    Raises:
        InputError: facts to merge are of another model.
    """
    if merged:
        hashes = model_hashes(open_checkpoint(model))
        for folder in merged:
            KeptFacts.read(folder).check(hashes)
        kept = merge(merged, out=out, force=arguments["force"])
    else:
        with Renderer(err()) as progress:
            kept = collect(model, out=out, progress=progress, **arguments)
    write_json(json_target, kept.described)
    results(json_target).print(shown(kept))


def shown(kept: KeptFacts) -> Any:
    """The facts in short."""
    return table(("facts", ""), rows(kept.path, kept.described))


def rows(folder: Path, described: dict[str, Any]) -> list[tuple[str, Any]]:
    """What ``facts.json`` says of the facts in ``folder``."""
    text = described["calibration"]
    return [
        ("folder", str(folder)),
        ("collected", ", ".join(described["collected"])),
        ("text", f"{text['source']}: {text['samples']} windows, {text['tokens']} tokens"),
        ("blocks", described["blocks"]),
        ("size", N.size(sum(path.stat().st_size for path in folder.iterdir()))),
        ("model", f"weights {described['model']['weights'][:16]}"),
    ]
