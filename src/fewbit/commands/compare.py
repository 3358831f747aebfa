# SPDX-License-Identifier: Apache-2.0
"""``fewbit compare``: several quantized folders side by side, from their manifests and evaluations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbit.commands.console import err, results, table, write_json
from fewbit.containers import files, manifest
from fewbit.errors import InputError
from fewbit.report import numbers as N
from fewbit.report.rows import comparable, procedure
from fewbit.report.write import EVALUATION, write_comparison

KEYS = (
    "perplexity",
    "perplexity_stderr",
    "kl_mean",
    "kl_p999",
    "top1_agreement",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
)
HEADERS = (
    "folder", "format", "method", "size", "bits", "perplexity", "KL mean", "KL 99.9 %", "top-1", "prefill",
    "decode", "memory",
)  # fmt: skip


def run(folders: list[Path], json_target: str | None, report: Path | None) -> None:
    """One row a folder, in the order given.

    Raises:
        InputError: a folder holds no manifest, or there is nothing for a report.
    """
    found = [row(folder) for folder in folders]
    measured = [files.read_json(folder / EVALUATION) for folder in folders if (folder / EVALUATION).is_file()]
    if report is not None and not measured:
        raise InputError(f"the report {report}", "none of these folders was measured", "`fewbit eval OUT` measures one")
    problem = comparable(list(measured))
    write_json(json_target, {"rows": found, "warning": problem})
    if report is not None:
        write_comparison(report, measured)
    results(json_target).print(table(HEADERS, [cells(one) for one in found]))
    if len(measured) < len(folders):
        left = ", and folders without measurements are not in the report" if report is not None else ""
        err().print(f"note: a dash was not measured; `fewbit eval OUT` measures it{left}", markup=False)
    if problem is not None:
        err().print(f"warning: {problem}", markup=False)


def row(folder: Path) -> dict[str, Any]:
    """What is known of one folder; None where it was not measured."""
    described = manifest.read(folder)
    measured = files.read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    return {
        "folder": str(folder),
        "format": most(described, lambda layer: str(layer["format"])),
        "method": most(described, lambda layer: procedure(layer) or N.DASH),
        "size_bytes": described["size_bytes"],
        "bits_per_weight": described["bits_per_weight"],
        **{key: measured.get(key) for key in KEYS},
    }


def most(described: dict[str, Any], key: Callable[[dict[str, Any]], str]) -> str:
    """The value that most layers share, with ``+`` when others differ; embeddings and heads do not vote."""
    votes = Counter(key(layer) for layer in described["layers"] if layer.get("kind") not in ("embedding", "head"))
    if not votes:
        return N.DASH
    return votes.most_common(1)[0][0] + (" +" if len(votes) > 1 else "")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as it is printed."""
    return (
        row["folder"],
        row["format"],
        row["method"],
        N.size(row["size_bytes"]),
        N.significant(row["bits_per_weight"]),
        N.plus_minus(row["perplexity"], row["perplexity_stderr"]),
        N.significant(row["kl_mean"]),
        N.significant(row["kl_p999"]),
        N.percent(row["top1_agreement"]),
        N.significant(row["prefill_tokens_per_s"]),
        N.significant(row["decode_tokens_per_s"]),
        N.size(row["peak_rss_bytes"]),
    )
