# SPDX-License-Identifier: Apache-2.0
"""Killed at any instant, the same command continues and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.run.events import Event

KILLS = int(os.environ.get("FEWBIT_KILLS", "3"))
"""A full campaign is ``FEWBIT_KILLS=50 pytest tests/run/test_resume.py``."""

SCRIPT = """
import sys, fewbit
model, out = sys.argv[1:]
print("ready", flush=True)
fewbit.quantize(model, "int4/g32/asym", method="gptq", out=out, samples=8, context=64)
"""


class Stop(Exception):
    pass


def test_stopped_after_every_stage_and_continued(
    short: Callable[..., Any], hashes: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    short(tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if event.kind == "block" or event.name.endswith("v_proj"):
            raise Stop

    out = tmp_path / "whole2"
    stops = 0
    while not out.exists():
        try:
            short(out, progress=interrupt if stops < 4 else None)
        except Stop:
            stops += 1
    assert stops == 4
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.timeout(60 + 40 * KILLS)
def test_killed_at_random_instants(
    tiny: Path, short: Callable[..., Any], hashes: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    short(tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    rng = random.Random(0)
    command = [sys.executable, "-c", SCRIPT, str(tiny)]
    began = time.monotonic()
    with subprocess.Popen([*command, str(tmp_path / "timing")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ready = time.monotonic()
        process.wait()
    length, startup = time.monotonic() - ready, ready - began
    assert process.returncode == 0, f"after {startup:.1f} s of start"
    out, killed = tmp_path / "killed", 0
    while killed < KILLS:
        with subprocess.Popen([*command, str(out)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(timeout=rng.uniform(0.0, length))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        if out.exists() and process.returncode == 0:
            assert hashes(out) == expected
            out = tmp_path / f"killed{killed}"
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert hashes(out) == expected


def test_nothing_is_left_beside_the_folder(short: Callable[..., Any], tmp_path: Path) -> None:
    short(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log.json"]
    assert not (tmp_path / "out" / "state").exists()
    assert fewbit.load(tmp_path / "out") is not None
