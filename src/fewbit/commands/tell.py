# SPDX-License-Identifier: Apache-2.0
"""``fewbit tell``: text to calibrate on, from the model itself."""

from __future__ import annotations

from pathlib import Path

from fewbit.commands.console import err, out
from fewbit.commands.progress import Renderer
from fewbit.report import numbers as N
from fewbit.run.telling import tell


def run(
    model: str,
    target: Path,
    samples: int,
    context: int,
    temperature: float,
    seed: int,
    batch: int,
    threads: int | None,
    device: str,
    force: bool,
) -> None:
    """Write the texts and say what takes them."""
    with Renderer(err(), "telling", "texts") as progress:
        path = tell(
            model,
            target,
            samples=samples,
            context=context,
            temperature=temperature,
            seed=seed,
            batch=batch,
            threads=threads,
            device=device,
            force=force,
            progress=progress,
        )
    out().print(f"{samples} texts of {context} tokens, {N.size(path.stat().st_size)}: {path}", markup=False)
    err().print(f"fewbit quantize {model} --calibration {path} ... learns from them", markup=False)
