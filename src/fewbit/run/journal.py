# SPDX-License-Identifier: Apache-2.0
"""What makes a run continue: a fingerprint of everything it depends on, and the stages that are finished.

The journal lives beside the shards in ``OUT.partial/state`` and is replaced atomically after every stage, once the
stage's shard and activations are on disk. A run killed at any instant therefore finds itself between two stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.containers.files import read_json, write_bytes
from fewbit.errors import ResumeError

SHOWN = 48
"""Characters of a value that has changed."""


class Journal:
    """``fingerprint`` (a dict of strings, or of dicts of them) and one record per finished stage."""

    def __init__(self, path: Path, fingerprint: dict[str, str], stages: list[dict[str, Any]]) -> None:
        self.path, self.fingerprint, self.stages = path, fingerprint, stages

    @staticmethod
    def open(path: Path, fingerprint: dict[str, str]) -> Journal:
        """Continue the journal at ``path``, or begin one.

        Raises:
            ResumeError: it belongs to a run with other weights, recipe, data, seed or version; the field is named.
        """
        if not path.exists():
            journal = Journal(path, fingerprint, [])
            journal.become([])
            return journal
        found = read_json(path)
        compare(found["fingerprint"], fingerprint, path.parent.parent)
        return Journal(path, fingerprint, found["stages"])

    def finish(self, record: dict[str, Any]) -> None:
        self.become([*self.stages, record])

    def become(self, stages: list[dict[str, Any]]) -> None:
        """``stages`` in place of those there are, at once."""
        self.stages = stages
        whole = {"fingerprint": self.fingerprint, "stages": self.stages}
        # On one line, which json writes ten times as fast: the whole journal is written after every stage.
        write_bytes(self.path, json.dumps(whole, ensure_ascii=False, allow_nan=False).encode())


def compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise ResumeError naming every field in which ``now`` differs from ``before``."""
    before, now = _flat(before), _flat(now)
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(_change(key, str(before.get(key)), str(now.get(key))) for key in differing)
        raise ResumeError(
            f"continuing the run in {folder}",
            f"{changes}",
            f"run with the original settings, or remove {folder} to start again",
        )


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of fields under both names."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= {f"{key} {name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _change(key: str, before: str, now: str) -> str:
    """Both values, long ones from shortly before where they differ."""
    alike = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    first = max(0, alike - SHOWN // 2)
    return f"{key} was {_excerpt(before, first)} and is {_excerpt(now, first)}"


def _excerpt(text: str, first: int) -> str:
    if len(text) <= SHOWN:
        return text
    last = first + SHOWN
    return f"{'...' if first else ''}{text[first:last]}{'...' if last < len(text) else ''}"
