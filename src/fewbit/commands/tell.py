# SPDX-License-Identifier: Apache-2.0
"""``fewbit tell``: text to calibrate a model on, by the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.commands.console import err, results, table, write_json
from fewbit.commands.progress import Renderer
from fewbit.containers.files import digest
from fewbit.run.telling import tell


def run(model: str, out: Path, json_target: str | None, **arguments: Any) -> None:
    """Write the text; ``arguments`` are those of :func:`fewbit.tell`."""
    with Renderer(err()) as progress:
        path = tell(model, out, progress=progress, **arguments)
    names = ("samples", "context", "temperature", "seed", "batch", "device")
    told = {"path": str(path), "sha256": digest(path), **{name: arguments[name] for name in names}}
    write_json(json_target, told)
    results(json_target).print(table(("told", ""), [(name, str(value)) for name, value in told.items()]))
