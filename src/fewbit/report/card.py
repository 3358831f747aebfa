# SPDX-License-Identifier: Apache-2.0
"""The model card: ``README.md`` of a quantized folder, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fewbit.report import numbers as N
from fewbit.report.html import worst_first
from fewbit.report.rows import Figures, rows, verdict
from fewbit.report.table import short

WORST = 5
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def card(manifest: Mapping[str, Any], evaluation: Figures | None, source_card: str | None = None) -> str:
    """Markdown.

    Args:
        manifest: ``fewbit.json``.
        evaluation: ``Evaluation.to_json()``, or None when nothing was measured.
        source_card: the README of the original, whose licence is inherited.
    """
    licence = licence_of(source_card)
    sees = str(manifest["source"].get("architecture")).endswith("ForConditionalGeneration")
    parts = [
        _front_matter(manifest, licence, "image-text-to-text" if sees else "text-generation"),
        f"# {_plain(short(str(manifest['source'].get('path', 'model'))))}, quantized with fewbit\n",
        _results(evaluation),
        _loading(*(("ImageTextToText", "Processor") if sees else ("CausalLM", "Tokenizer"))),
        _making(manifest),
        _layers(manifest),
        _measuring(evaluation),
        _limits(licence),
    ]
    return "\n".join(part for part in parts if part)


def licence_of(source_card: str | None) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` from the front matter of a card; empty when it names none."""
    found = _FRONT_MATTER.match(source_card or "")
    if found is None:
        return {}
    lines = re.findall(r"^(license|license_name|license_link):[ \t]*(\S.*?)[ \t]*$", found[1], re.MULTILINE)
    return {key: value.strip("\"'") for key, value in lines}


def _front_matter(manifest: Mapping[str, Any], licence: Mapping[str, str], task: str) -> str:
    # JSON strings are YAML strings, so a hostile name cannot leave its quotes.
    source = str(manifest["source"].get("path", ""))
    formats = Counter(str(layer.get("format")) for layer in manifest.get("layers", []))
    lines = [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    if _HUB_ID.fullmatch(source):
        lines += [f"base_model: {json.dumps(source)}", "base_model_relation: quantized"]
    tags = ["fewbit", "quantized", *(name for name, _ in formats.most_common(3))]
    lines += ["library_name: transformers", f"pipeline_tag: {task}", f"tags: {json.dumps(tags)}"]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _results(evaluation: Figures | None) -> str:
    if evaluation is None:
        return "Not evaluated. Run `fewbit eval` on this folder.\n"
    found = verdict(evaluation)
    lines = [found.headline, "", *(f"> **{_plain(warning)}**\n" for warning in found.warnings)]
    lines += ["| | original | quantized | |", "|---|---:|---:|---|"]
    lines += [f"| {row.label} | {row.before} | {row.after} | {row.change} |" for row in rows(evaluation)]
    return "\n".join(lines) + "\n"


def _loading(kind: str, reader: str) -> str:
    return f"""## How to load

```python
import fewbit  # pip install fewbit
from transformers import AutoModelFor{kind}, Auto{reader}

model = AutoModelFor{kind}.from_pretrained("this-folder")  # or fewbit.load("this-folder"), which checks every hash
{reader.lower()} = Auto{reader}.from_pretrained("this-folder")
```
"""


def _making(manifest: Mapping[str, Any]) -> str:
    calibration = manifest.get("calibration")
    used = "none: the method needs no data"
    if calibration:
        used = (
            f"{_plain(str(calibration.get('source')))}, {calibration.get('samples')} samples of "
            f"{calibration.get('context')} tokens (SHA-256 `{str(calibration.get('sha256'))[:16]}`)"
        )
    source = manifest["source"]
    return f"""## How it was made

- Original: {_plain(short(str(source.get("path"))))} ({_plain(str(source.get("architecture")))})
- SHA-256 of the original: `{source.get("sha256")}`
- fewbit {manifest.get("version")}, seed {manifest.get("seed")}
- Calibration: {used}
- Every tensor's format, true bits and error are in `fewbit.json`.

Recipe:

```json
{json.dumps(manifest.get("recipe"), indent=2, ensure_ascii=False).replace("```", "` ` `")}
```
"""


def _layers(manifest: Mapping[str, Any]) -> str:
    layers = worst_first(manifest.get("layers", []))
    lines = [
        "## Layers",
        "",
        f"{len(layers)} quantized, {len(manifest.get('skipped', []))} tensors kept as they were "
        f"({N.size(sum(int(entry.get('nbytes') or 0) for entry in manifest.get('skipped', [])))}). The worst:",
        "",
        "| layer | relative error | bits | format |",
        "|---|---:|---:|---|",
    ]
    lines += [
        f"| {_plain(str(layer['name']))} | {N.percent(layer.get('relative_error'), 2)} | "
        f"{N.significant(layer.get('bits_per_weight'))} | {_plain(str(layer.get('format')))} |"
        for layer in layers[:WORST]
    ]
    return "\n".join(lines) + "\n"


def _measuring(evaluation: Figures | None) -> str:
    protocol = (evaluation or {}).get("protocol")
    if not protocol:
        return ""
    machine = (evaluation or {}).get("environment", {})
    lines = [
        "## How it was measured",
        "",
        f"- Text: {_plain(str(protocol.get('text')))}; {protocol.get('windows')} windows of {protocol.get('context')}",
        *(f"- {label}: {_plain(str(protocol.get(key)))}" for label, key in _PROTOCOL),
        f"- Machine: {_plain(str(machine.get('cpu')))}, {machine.get('threads')} threads, {machine.get('isa')}; "
        f"torch {machine.get('torch')}, transformers {machine.get('transformers')}; {machine.get('time')}",
        *(f"- {_plain(str(note))}" for note in protocol.get("notes", [])),
    ]
    return "\n".join(lines) + "\n"


_PROTOCOL = (
    ("Perplexity", "perplexity"),
    ("Errors", "stderr"),
    ("KL", "kl"),
    ("Speed", "speed"),
    ("Memory", "peak_rss"),
)


def _limits(licence: Mapping[str, str]) -> str:
    terms = (
        f"The licence of the original applies: {_plain(licence.get('license_name') or licence['license'])}."
        if licence.get("license")
        else "The licence of the original applies; the original names none that could be read here."
    )
    return f"""## Limits

- Quantizing changes the model. The figures above hold for the text they were measured on; other languages, code
  and long contexts can suffer more. Measure on your own data: `fewbit eval this-folder --text yours.txt`.
- Speed holds for the machine named above.
- What the original does wrong, this does too.

{terms}
"""


def _plain(text: str) -> str:
    """Text that stays text in Markdown and HTML, also inside a table."""
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", text.replace("\n", " ").replace("\r", " "))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
