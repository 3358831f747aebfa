# SPDX-License-Identifier: Apache-2.0
"""The estimate before a run counts what takes long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit import methods
from fewbit.run import effort

RATE = 1e9


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "_rate", lambda: RATE)


def seconds(tiny: Path, format: str, method: str = "rtn", **more: Any) -> float:
    return fewbit.plan(tiny, format, method=method, head="float", force=True, **more).seconds


def weights(tiny: Path) -> int:
    return sum(d.weights for d in fewbit.plan(tiny, "int4/g32", head="float").decisions if d.rule is not None)


def test_choosing_vectors_and_tables_takes_its_time(tiny: Path) -> None:
    gptq, vptq = (seconds(tiny, format, name) for format, name in (("int4/g32", "gptq"), ("vector2x4", "vptq")))
    assert vptq - gptq >= weights(tiny) * methods.named("vptq").work / RATE
    tables = seconds(tiny, "palette3/row") - seconds(tiny, "int3/channel")
    assert tables == pytest.approx(weights(tiny) * effort.CLUSTERED / RATE)


def test_steps_are_of_the_windows_that_there_are(tiny: Path) -> None:
    def steps(context: int, samples: int = 8) -> float:
        data = {"samples": samples, "context": context}
        return seconds(tiny, "int4/g32", "autoround", **data) - seconds(tiny, "int4/g32", "clip", **data)

    assert steps(64) == pytest.approx(2 * steps(32), rel=1e-6)
    assert steps(32, samples=4) == pytest.approx(steps(32) / 2, rel=1e-6)


def test_a_rotation_that_is_learned_takes_its_time(tiny: Path) -> None:
    plain, learned = (seconds(tiny, "int4/g32", transforms=[name]) for name in ("quarot", "spinquant"))
    assert learned > plain + 100 * weights(tiny) * 1000 / RATE


def test_a_run_that_asks_for_no_time_times_no_product(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed() -> float:
        timings.append(1)
        return RATE

    timings: list[int] = []
    monkeypatch.setattr(effort, "_rate", timed)
    planned = fewbit.plan(tiny, "int4/g32", head="float")
    assert not timings
    assert planned.to_json()["seconds"] == planned.seconds and len(timings) == 1
