# SPDX-License-Identifier: Apache-2.0
"""``fewbit plan``: what a run would give and take, before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fewbit
from fewbit.commands.console import err, results, table, write_json
from fewbit.commands.quantize import Request
from fewbit.report import numbers as N
from fewbit.report.rows import procedure


def run(request: Request, json_target: str | None) -> None:
    """Print the plan; nothing is written but the JSON file."""
    planned = fewbit.plan(request.model, request.recipe(), facts=request.facts, **request.planning()).to_json()
    write_json(json_target, planned)
    console = results(json_target)
    console.print(summary(planned))
    for each in layers(planned):
        console.print(each)
    warn(planned)


def summary(planned: dict[str, Any]) -> Any:
    """The figures of the whole model."""
    source = planned["source_bytes"]
    rows = [
        (
            "size",
            f"{N.size(planned['size_bytes'])}, {planned['size_bytes'] / source:.1%} of the original's {N.size(source)}",
        ),
        (
            "true bits per weight",
            f"{N.significant(planned['bits_per_weight'], 4)} (scales included; quantized matrices)",
        ),
        ("peak memory", f"about {N.size(planned['peak_rss_bytes'])} (estimate)"),
        ("time", f"about {N.seconds(planned['seconds'])} (estimate)"),
        ("kernels", ", ".join(sorted({layer["kernel"] for layer in planned["layers"] if layer["kernel"]}))),
    ]
    return table(("plan", ""), rows)


def layers(planned: dict[str, Any]) -> Iterator[Any]:
    """Every layer: what happens to it, and to inputs where any are rounded, and who will compute it; then what stays as
    it is, and why."""
    found, stays = planned["layers"], [x for x in planned["layers"] if x["reason_skipped"]]
    rounded = any(x["activation"] for x in found)

    def row(name: str, format: str, inputs: str | None, *rest: Any) -> tuple[Any, ...]:
        return (name, format, inputs, *rest) if rounded else (name, format, *rest)

    made = [
        row(x["name"], x["format"], x["activation"], procedure(x), x["kernel"], N.size(x["nbytes"]))
        for x in found
        if not x["reason_skipped"]
    ]
    head = row("layer", "format", "inputs", "method", "kernel", "size")
    yield table(head, made, f"{len(made)} layers to quantize")
    kept = [(x["name"], x["reason_skipped"], N.size(x["nbytes"])) for x in stays]
    kept += [(x["name"], x["reason"], N.size(x["nbytes"])) for x in planned["kept"]]
    yield table(("not quantized", "reason", "size"), kept, f"{len(kept)} kept")


def warn(planned: dict[str, Any]) -> None:
    """What the user should know before spending the time."""
    for warning in planned["warnings"]:
        err().print(f"warning: {warning}", markup=False)
