# SPDX-License-Identifier: Apache-2.0
"""``fewbit tell``: text to calibrate on, from the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.commands.console import err, out
from fewbit.commands.progress import Renderer
from fewbit.report import numbers as N
from fewbit.run.telling import tell


def run(model: str, target: Path, **arguments: Any) -> None:
    """Write the texts and say what takes them; ``arguments`` are those of :func:`fewbit.tell`."""
    with Renderer(err(), "telling", "texts") as progress:
        path = tell(model, target, progress=progress, **arguments)
    told = "{samples} texts of {context} tokens".format(**arguments)
    out().print(f"{told}, {N.size(path.stat().st_size)}: {path}", markup=False)
    err().print(f"fewbit quantize {model} --calibration {path} ... learns from them", markup=False)
