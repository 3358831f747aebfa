# SPDX-License-Identifier: Apache-2.0
"""``fewbit compare``: several quantized folders side by side, from their manifests and evaluations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fewbit.commands.console import err, figure, results, size, table, write_json
from fewbit.containers import files, manifest

KEYS = (
    "size_bytes",
    "bits_per_weight",
    "perplexity",
    "perplexity_stderr",
    "kl_mean",
    "kl_p999",
    "top1_agreement",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
)


def run(folders: list[Path], json_target: str | None) -> None:
    """One row a folder, in the order given.

    Raises:
        InputError: a folder holds no manifest.
    """
    rows = [row(folder) for folder in folders]
    write_json(json_target, {"rows": rows, "same_text": same_text(rows)})
    results(json_target).print(table(HEADERS, [cells(row) for row in rows]))
    if any(row["perplexity"] is None for row in rows):
        err().print("note: a dash means that it was not measured; `fewbit eval OUT` measures it", markup=False)
    if not same_text(rows):
        err().print("warning: the evaluations read different texts or contexts; their figures do not compare", markup=False)


HEADERS = ("folder", "format", "method", "size", "bits", "perplexity", "KL", "KL 99.9%", "top-1", "prefill t/s", "decode t/s")


def row(folder: Path) -> dict[str, Any]:
    """What is known of one folder; None where it was not measured."""
    described = manifest.read(folder)
    measured = files.read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else {}
    found = {"folder": str(folder), "format": most(described, "format"), "method": most(described, "method")}
    found |= {key: measured.get(key) for key in KEYS}
    found["size_bytes"], found["bits_per_weight"] = described["size_bytes"], described["bits_per_weight"]
    found["text"] = [measured.get("text_sha256"), measured.get("context")] if measured else None
    return found


def most(described: dict[str, Any], key: str) -> str:
    """The value that most layers share, with ``+`` when others differ; embeddings and heads do not vote."""
    votes = Counter(layer[key] for layer in described["layers"] if layer.get("kind") not in ("embedding", "head"))
    if not votes:
        return "-"
    return str(votes.most_common(1)[0][0]) + (" +" if len(votes) > 1 else "")


def same_text(rows: list[dict[str, Any]]) -> bool:
    """Whether all evaluations that exist read the same text in the same windows."""
    texts = [row["text"] for row in rows if row["text"] is not None]
    return all(text == texts[0] for text in texts)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as it is printed."""
    perplexity = figure(row["perplexity"])
    if row["perplexity_stderr"] is not None:
        perplexity += f" ± {figure(row['perplexity_stderr'], 2)}"
    agreement = "-" if row["top1_agreement"] is None else f"{row['top1_agreement']:.2%}"
    return (
        row["folder"],
        row["format"],
        row["method"],
        size(row["size_bytes"]),
        figure(row["bits_per_weight"]),
        perplexity,
        figure(row["kl_mean"], 4),
        figure(row["kl_p999"], 3),
        agreement,
        figure(row["prefill_tokens_per_s"], 1),
        figure(row["decode_tokens_per_s"], 1),
    )
