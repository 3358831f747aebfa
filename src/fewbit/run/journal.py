# SPDX-License-Identifier: Apache-2.0
"""What makes a run continue: a fingerprint of everything it depends on, and the stages that are finished.

The journal lives beside the shards in ``OUT.partial/state`` and is replaced atomically after every stage, once the
stage's shard and activations are on disk. A run killed at any instant therefore finds itself between two stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbit.containers.files import read_json, write_bytes
from fewbit.errors import ResumeError


class Journal:
    """``fingerprint`` (flat dict of strings) and one record per finished stage."""

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


def compare(before: dict[str, str], now: dict[str, str], folder: Path) -> None:
    """Raise ResumeError naming every field in which ``now`` differs from ``before``."""
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {before.get(key)!s:.60} and is {now.get(key)!s:.60}" for key in differing)
        raise ResumeError(
            f"continuing the run in {folder}",
            f"{changes}",
            f"run with the original settings, or remove {folder} to start again",
        )
