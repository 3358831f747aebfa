# SPDX-License-Identifier: Apache-2.0
"""One HTML file that opens offline: nothing is loaded from anywhere, and a content policy in the page forbids it.

Names come from model files, so they are hostile until escaped: the template escapes everything that is not built by
:mod:`fewbit.report.svg`, and the policy admits the page's own script by its hash and no other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fewbit.report import numbers as N
from fewbit.report import plots, rows
from fewbit.report.rows import Figures, Row, Verdict
from fewbit.report.table import references, short

LAYERS_SHOWN = 400
"""Rows of the layer table; a mixture of experts has tens of thousands, and ``fewbit.json`` holds them all."""


def page(manifest: Mapping[str, Any] | None, evaluation: Figures | None) -> str:
    """The report of one model.

    Args:
        manifest: ``fewbit.json``, or None for a model that fewbit did not write.
        evaluation: ``Evaluation.to_json()``, or None when nothing was measured.
    """
    manifest = manifest or {}
    verdict = rows.verdict(evaluation) if evaluation else _unmeasured(manifest)
    name = short(evaluation["model"]) if evaluation else short(str(manifest.get("source", {}).get("path", "model")))
    layers = worst_first(manifest.get("layers") or [])
    return _render(
        title=name,
        verdict=verdict,
        original=short(_original(manifest, evaluation)),
        tiles=_tiles(evaluation) if evaluation else [],
        groups=_groups(rows.rows(evaluation)) if evaluation else [],
        plots=_plots(manifest, [evaluation] if evaluation else []),
        heatmaps=_heatmaps(manifest.get("layers") or []),
        layers=layers[:LAYERS_SHOWN],
        layers_total=len(layers),
        timed=any(layer.get("seconds") is not None for layer in layers),
        largest=max((_error(layer) for layer in layers if math.isfinite(_error(layer))), default=0) or 1,
        skipped=_skipped(manifest.get("skipped") or []),
        comparison=None,
        facts=_facts(manifest),
        recipe=json.dumps(manifest["recipe"], indent=2, ensure_ascii=False) if manifest.get("recipe") else "",
        measured=_measured(evaluation or {}),
        notes=(evaluation or {}).get("protocol", {}).get("notes", []),
        files=manifest.get("files") or {},
    )


def compare_page(evaluations: Sequence[Figures]) -> str:
    """Several results side by side: table and plot."""
    names = ", ".join(short(e["model"]) for e in evaluations)
    reason = rows.comparable(list(evaluations))
    best = min(evaluations, key=lambda e: e["size_bytes"])
    smallest = f"{short(best['model'])} with {N.size(best['size_bytes'])}"
    headline = f"{len(evaluations)} results; the smallest is {smallest}." if len(evaluations) > 1 else f"{smallest}."
    return _render(
        title=f"Comparison: {names}",
        verdict=Verdict(headline, "plain", (reason,) if reason else ()),
        original=", ".join(short(e["model"]) for e in references(evaluations)),
        tiles=[], groups=[], heatmaps=[], layers=[], layers_total=0, timed=False, largest=1, skipped=[], facts=[],
        recipe="",
        plots=_plots({}, list(evaluations)),
        comparison=_comparison(evaluations),
        measured=_measured(evaluations[0]),
        notes=[],
        files={},
    )  # fmt: skip


def _render(**context: Any) -> str:
    folder = resources.files("fewbit.report")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        significant=N.significant, size=N.size, percent=N.percent, seconds=N.seconds, procedure=rows.procedure
    )
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=Markup(folder.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        **context,
    )


def _error(layer: Mapping[str, Any]) -> float:
    """An error to sort by: what is not finite is the worst, what is not known comes last."""
    value = layer.get("relative_error")
    if not isinstance(value, int | float):
        return -1.0
    return float(value) if math.isfinite(value) else math.inf


def worst_first(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Layers by descending error; equal ones in their order in the model."""
    return sorted(layers, key=lambda layer: -_error(layer))


def _original(manifest: Mapping[str, Any], evaluation: Figures | None) -> str:
    reference = (evaluation or {}).get("reference")
    return str(reference["model"] if reference else manifest.get("source", {}).get("path", ""))


def _unmeasured(manifest: Mapping[str, Any]) -> Verdict:
    bits = N.significant(manifest.get("bits_per_weight"))
    check = manifest.get("check") or {}
    headline = f"{bits} bits per weight, {N.size(manifest.get('size_bytes'))}."
    if check.get("kl_mean") is None:
        return Verdict(headline, "plain", ("Not evaluated yet: run `fewbit eval`.",))
    words, tone = rows.closeness(float(check["kl_mean"]))
    note = f"From the short check after writing ({check.get('tokens', 0)} tokens); `fewbit eval` measures properly."
    return Verdict(f"{words[0].upper()}{words[1:]}: {headline}", tone, (note,))


def _tiles(evaluation: Figures) -> list[dict[str, Any]]:
    """The figures that decide, each with bars whose lengths are in proportion."""
    before = evaluation.get("reference") or {}
    table = {row.label: row for row in rows.rows(evaluation)}
    wanted = (
        ("Size on disk", "size_bytes"),
        ("Bits per weight", "bits_per_weight"),
        ("Perplexity", "perplexity"),
        ("Decode", "decode_tokens_per_s"),
        ("Peak memory", "peak_rss_bytes"),
    )
    tiles = []
    for label, key in wanted:
        row, values = table.get(label), [f.get(key) or 0 for f in (before, evaluation)]
        if row is None or not values[1]:
            continue
        bars = [100 * value / max(values) for value in values]
        head, tail = (row.change or row.after).partition(":")[::2]
        head, _, error = head.partition(" ± ")
        note = tail.strip() or (f"± {error} %" if error else "")
        tiles.append(
            row.__dict__
            | {"head": head.removesuffix(" %") + " %" if "%" in head else head, "detail": note, "bars": bars}
        )
    return tiles


def _groups(found: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(group, [row for row in found if row.group == group]) for group in dict.fromkeys(r.group for r in found)]


def _plots(manifest: Mapping[str, Any], evaluations: Sequence[Figures]) -> list[tuple[str, str, Markup]]:
    """(heading, explanation, drawing) of every plot that has data."""
    drawn = [
        ("Accuracy against size", "Down and to the left is better. Whiskers: one standard error.",
         plots.quality_against_size(evaluations) if evaluations else None),
        ("How unlike the original, token by token", "A few bad tokens, or a little harm everywhere?",
         plots.divergence_curve(evaluations[0]) if len(evaluations) == 1 else None),
        ("Divergence against bits", "Down and to the left is better. Logarithmic.",
         plots.divergence_against_bits(evaluations) if len(evaluations) > 1 else None),
        ("Drift over the blocks", "How errors of the blocks add up.", plots.drift(manifest)),
        ("Error by projection", "Which kind of layer suffers, and its outliers.",
         plots.spread(manifest.get("layers") or [])),
    ]  # fmt: skip
    return [(heading, words, drawing) for heading, words, drawing in drawn if drawing is not None]


def _heatmaps(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Markup]]:
    drawn = [
        ("Relative output error", "By how much a layer's output moves on held-out text. Logarithmic colours.",
         plots.heatmap(layers, "relative_error", "Relative error", "heat", log=True)),
        ("Bits per weight", "Scales included.",
         plots.heatmap(layers, "bits_per_weight", "Bits per weight", "cool", log=False)),
        ("Where the bytes are", "", plots.weight_bytes({"layers": layers})),
    ]  # fmt: skip
    return [(heading, words, drawing) for heading, words, drawing in drawn if drawing is not None]


def _skipped(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a reason: how many, how big, and their names."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(str(entry.get("reason", "")), []).append(entry)
    return [
        {
            "reason": reason,
            "count": len(group),
            "nbytes": sum(int(entry.get("nbytes") or 0) for entry in group),
            "names": [str(entry.get("name", "")) for entry in group],
        }
        for reason, group in groups.items()
    ]


def _comparison(evaluations: Sequence[Figures]) -> dict[str, Any]:
    ordered = sorted(evaluations, key=lambda e: e["size_bytes"])
    lines = [(figures, True) for figures in references(evaluations)] + [(figures, False) for figures in ordered]
    return {
        "warning": rows.comparable(list(evaluations)),
        "lines": [
            {
                "name": short(figures["model"]),
                "path": figures["model"],
                "original": original,
                "perplexity": N.plus_minus(figures.get("perplexity"), figures.get("perplexity_stderr")),
                "tone": "plain"
                if original or figures.get("kl_mean") is None
                else rows.closeness(figures["kl_mean"])[1],
                **{key: figures.get(key) for key in _COMPARED},
            }
            for figures, original in lines
        ],
    }


_COMPARED = (
    "bits_per_weight", "size_bytes", "kl_mean", "kl_p999", "top1_agreement", "prefill_tokens_per_s",
    "decode_tokens_per_s", "peak_rss_bytes",
)  # fmt: skip


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the model was made, as (what, value)."""
    if not manifest:
        return []
    source, calibration = manifest.get("source", {}), manifest.get("calibration")
    layers = manifest.get("layers") or []
    used = "none: data-free"
    if calibration:
        used = (
            f"{calibration.get('source')}: {calibration.get('samples')} samples of {calibration.get('context')} "
            f"tokens, "
            f"SHA-256 {str(calibration.get('sha256'))[:16]}…"
        )
    return [
        ("Made from", f"{source.get('path')} ({source.get('architecture')})"),
        ("SHA-256 of the source", str(source.get("sha256"))),
        ("fewbit", f"{manifest.get('version')}, seed {manifest.get('seed')}"),
        ("Calibration", used),
        ("Formats", _count(layer.get("format") for layer in layers)),
        ("Methods", _count(rows.procedure(layer) for layer in layers)),
        ("Kernels of this machine when it was made", _count(layer.get("kernel") for layer in layers)),
    ]


def _count(values: Any) -> str:
    return ", ".join(f"{value} ({number})" for value, number in Counter(str(v) for v in values).most_common())


_VERSIONS = ("fewbit", "torch", "transformers", "python")


def _measured(evaluation: Figures) -> list[tuple[str, str]]:
    """Protocol and environment, as (what, value)."""
    protocol, environment = evaluation.get("protocol", {}), evaluation.get("environment", {})
    if not protocol:
        return []
    bos = ", each starting with BOS" if protocol.get("bos") else ""
    words = "; ".join(f"below {N.significant(bound)}: {text}" for bound, text, _ in rows.CLOSENESS)
    return [
        ("Text", f"{protocol.get('text')}, tokens SHA-256 {str(protocol.get('tokens_sha256'))[:16]}…"),
        ("Windows", f"{protocol.get('windows')} of {protocol.get('context')} tokens{bos}; "
                    f"{protocol.get('tokens_scored')} tokens scored"),
        ("Perplexity", str(protocol.get("perplexity"))),
        ("Standard errors", str(protocol.get("stderr"))),
        ("KL", str(protocol.get("kl"))),
        ("Words for KL", f"{words}; above: {rows.BEYOND[0]}"),
        ("Speed", str(protocol.get("speed"))),
        ("Memory", str(protocol.get("peak_rss"))),
        ("Machine", f"{environment.get('cpu')}, {environment.get('cores')} cores, "
                    f"{environment.get('threads')} threads, {environment.get('isa')}, {environment.get('system')}"),
        ("Versions", ", ".join(f"{key} {environment.get(key)}" for key in _VERSIONS)),
        ("When", str(environment.get("time"))),
    ]  # fmt: skip
