# SPDX-License-Identifier: Apache-2.0
"""``fewbit restore``: a float model that is easier to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.commands.console import err, out
from fewbit.commands.progress import Renderer
from fewbit.run.restoring import restore


def run(model: str, quantized: Path, target: Path, **arguments: Any) -> None:
    """Write the folder and say what takes it; ``arguments`` are those of :func:`fewbit.restore`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with Renderer(err(), "restoring", "steps") as progress:
        restore(model, quantized, out=target, progress=progress, **arguments)
    out().print(f"a float model, restored by {arguments['steps']} steps: {target}", markup=False)
    err().print(f"quantize it as you quantized {model}", markup=False)
