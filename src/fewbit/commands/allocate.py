# SPDX-License-Identifier: Apache-2.0
"""``fewbit allocate``: a recipe for a budget of true bits."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from fewbit.commands.console import err, results, table, write_json
from fewbit.commands.progress import Renderer
from fewbit.containers.files import refuse_existing, write_bytes
from fewbit.report import numbers as N
from fewbit.search import Allocation, allocate
from fewbit.search.candidates import DEFAULT


def run(
    model: str, budget: float, candidates: list[str] | None, out: Path, json_target: str | None, **arguments: Any
) -> None:
    """Print what was chosen, and write the recipe; ``arguments`` are those of :func:`fewbit.allocate`.

    Raises:
        InputError: ``out`` exists and ``force`` is off.
    """
    refuse_existing(out, arguments["force"])
    with Renderer(err(), "weighing", "units") as progress:
        found = allocate(model, budget, candidates=candidates or DEFAULT, progress=progress, **arguments)
    write_bytes(out, f"# {told(found)}\n\n{found.recipe.to_toml()}".encode())
    write_json(json_target, found.to_json())
    console = results(json_target)
    for shown in tables(found):
        console.print(shown)
    command = f"fewbit quantize {shlex.quote(model)} --recipe {shlex.quote(str(out))} -o OUT"
    err().print(f"written: {out}; `{command}`", markup=False)


def told(found: Allocation) -> str:
    """The allocation in one line."""
    bits = f"{found.bits:.3f} true bits a weight of the blocks' layers, budget {found.budget:g}"
    return f"fewbit allocate: {bits}, by {found.by}"


def tables(found: Allocation) -> list[Any]:
    """What kinds of layers got, and the whole beside uniform choices."""
    names = list(dict.fromkeys(row.candidate for row in found.uniform))
    kinds = list(dict.fromkeys(row.kind for row in found.layers))
    rows = []
    for kind in kinds:
        mine = [row for row in found.layers if row.kind == kind]
        weights, harm = sum(row.weights for row in mine), sum(row.harm for row in mine)
        counts = [sum(row.candidate == name for row in mine) or None for name in names]
        bits = sum(row.bits * row.weights for row in mine) / weights
        share = N.percent(harm / found.expected) if found.expected else None
        rows.append((kind, *counts, f"{bits:.3f}", share))
    whole: list[tuple[str | None, ...]] = [
        (row.candidate, f"{row.bits:.3f}", N.significant(row.expected, 3), N.significant(row.measured, 3))
        for row in found.uniform
    ]
    whole += [("allocated", f"{found.bits:.3f}", N.significant(found.expected, 3), N.significant(found.measured, 3))]
    if found.bound is not None:
        whole += [("no choice expects less than", f"{found.budget:.3f}", N.significant(found.bound, 3), None)]
    headers = ("all layers", "true bits", "expected KL", "measured KL")
    kept = headers if found.measured is not None else headers[:3]
    return [
        table(("layers", *(name.replace(":", " ") for name in names), "true bits", "of expected KL"), rows),
        table(kept, [row[: len(kept)] for row in whole]),
    ]
