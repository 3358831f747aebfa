# SPDX-License-Identifier: Apache-2.0
"""Events as lines."""

from __future__ import annotations

import io

from rich.console import Console

from fewbit.commands.progress import Renderer
from fewbit.run.events import Event

RUN = (
    Event("start", blocks=2),
    Event(
        "layer", "model.layers.0.mlp.down_proj", 1, 2, error=0.0412, bits=4.25, seconds=0.31, peak_rss_bytes=640_000_000
    ),
    Event("block", block=1, blocks=2, eta_seconds=80.0),
    Event("layer", "model.layers.1.mlp.down_proj", 2, 2, error=0.5, bits=4.25, seconds=0.3, peak_rss_bytes=641_000_000),
    Event("note", message="expert 3 saw no token [fallback]"),
    Event("block", block=2, blocks=2, eta_seconds=0.0),
    Event("done", message="out"),
)


def shown(terminal: bool) -> str:
    stream = io.StringIO()
    with Renderer(Console(file=stream, force_terminal=terminal, width=200, highlight=False)) as progress:
        for event in RUN:
            progress(event)
    return stream.getvalue()


def test_lines_without_a_terminal() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "2 blocks"
    for part in ("1/2 model.layers.0.mlp.down_proj", "4.12%", "4.250 bits", "0.31 s", "peak 640 MB"):
        assert part in lines[1]
    assert lines[2] == "block 1/2 written, 1 min 20 s left"
    assert lines[3].endswith("1 min 20 s left")
    assert lines[4] == "note: expert 3 saw no token [fallback]"
    assert lines[-1] == "written, read back and checked: out"


def test_no_escape_codes_without_a_terminal() -> None:
    assert "\x1b" not in shown(terminal=False)


def test_bar_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "2/2 blocks" in text
    assert "model.layers.0.mlp.down_proj" in text
    assert "block 1/2 written" not in text
