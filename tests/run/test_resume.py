# SPDX-License-Identifier: Apache-2.0
"""Killed at any instant, the same command continues and ends with the same bytes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.run.events import Event

KILLS = int(os.environ.get("FEWBIT_KILLS", "3"))
"""A full campaign, by all of WAYS, is ``FEWBIT_KILLS=50 pytest tests/run/test_resume.py``; without it, the first."""
WAYS: dict[str, dict[str, Any]] = {
    "gptq": {"recipe": "int4/g32/asym", "method": "gptq"},
    "awq": {"recipe": "int4/g32/asym", "method": "awq", "transforms": ["awq"]},
    "hqq": {"recipe": "int4/g32/min", "method": "hqq"},
    "autoround": {"recipe": "int3/g32/asym", "method": "autoround", "options": {"iters": 8}},
    "vptq": {"recipe": "vector4x8", "method": "vptq", "tune": [{"name": "vectors", "iters": 4}]},
    "squeezellm": {"recipe": "palette3/row", "method": "squeezellm"},
    "nanoquant": {"recipe": "sign/channel", "method": "nanoquant", "tune": [{"name": "scales", "iters": 4}]},
    "ptq161": {"recipe": "int1/channel/min", "method": "ptq161", "tune": [{"name": "scales", "iters": 4}]},
    "billm": {"recipe": "sign/g32", "method": "billm"},
    "spinquant": {"recipe": "W4A4", "transforms": [{"name": "spinquant", "steps": 6}]},
    "smooth": {"recipe": "W8A8_STATIC", "transforms": ["smooth"]},
    "distill": {"recipe": "int3/g32/asym", "tune": [{"name": "distill-weights", "iters": 6, "batch": 4}]},
}

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["fewbit.run", "fewbit.evaluation", "transformers.models.llama.modeling_llama"])


def quantizing(model: Path, way: dict[str, Any], out: Path) -> multiprocessing.process.BaseProcess:
    """A process that has begun to quantize, forked from one that had imported what that takes."""
    options = {**way, "out": out, "samples": 8, "context": 64, "force": True}
    process = FORKS.Process(target=fewbit.quantize, args=(model,), kwargs=options)
    process.start()
    return process


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


@pytest.mark.timeout(300 + 60 * KILLS)  # on a loaded machine
@pytest.mark.parametrize("name", WAYS if "FEWBIT_KILLS" in os.environ else list(WAYS)[:1])
def test_killed_at_random_instants(
    tiny: Path, name: str, hashes: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    way = WAYS[name]
    fewbit.quantize(tiny, **way, out=tmp_path / "whole", samples=8, context=64, force=True)
    expected = hashes(tmp_path / "whole")
    rng = random.Random(0)
    quantizing(tiny, way, tmp_path / "warm").join()  # starts the server
    began = time.monotonic()
    process = quantizing(tiny, way, tmp_path / "timing")
    process.join()
    length = time.monotonic() - began
    assert process.exitcode == 0
    out, killed = tmp_path / "killed", 0
    while killed < KILLS:
        process = quantizing(tiny, way, out)
        process.join(rng.uniform(0.0, length))
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        if out.exists() and process.exitcode == 0:
            assert hashes(out) == expected
            out = tmp_path / f"killed{killed}"
    process = quantizing(tiny, way, out)
    process.join()
    assert process.exitcode == 0 and hashes(out) == expected


def test_nothing_is_left_beside_the_folder_or_in_it(short: Callable[..., Any], tmp_path: Path) -> None:
    """A run that was killed leaves what it had begun to write."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".config.json.1506.tmp").write_text("{")
    short(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.log.json"]
    assert not (tmp_path / "out" / "state").exists() and not list((tmp_path / "out").glob(".*"))
    assert fewbit.load(tmp_path / "out") is not None
