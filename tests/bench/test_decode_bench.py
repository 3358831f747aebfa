# SPDX-License-Identifier: Apache-2.0
"""bench/decode.py: the row of a real folder, its process included, and energy from counters that are files here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fewbit.kernels import native
from fewbit.measure.energy import meter

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import decode

pytestmark = pytest.mark.skipif(not native.available(), reason="no native module here")


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    package = tmp_path / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "energy_uj").write_text("1000000\n")
    (package / "max_energy_range_uj").write_text("9000000\n")
    return package.parent


def test_energy_is_what_passed_while_a_row_decoded(powercap: Path) -> None:
    class Working:
        def ask(self, **asked: int) -> decode.Found:
            (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000\n")
            return {"wall": 1.0, "asked": asked}

    answered = decode.metered(meter(powercap=powercap), Working(), decode=4)
    assert answered == {"wall": 1.0, "asked": {"decode": 4}, "joules": 2.5}
    assert "joules" not in decode.metered(meter(powercap=powercap / "absent"), Working(), decode=4)


def test_a_row_of_a_folder(tiny_family: Callable[[str], Path], powercap: Path) -> None:
    row = decode.Row("ours", "fewbit", tiny_family("llama"), "-")
    asked = argparse.Namespace(
        prompt=8, tokens=2, context=4, streams=2, seconds=0, threads=1, clock="processor", format=None, activation=None
    )
    assert row.start(1) is None
    started = row.found
    for counters, joules, shown in ((powercap, 0, "0.000"), (powercap / "absent", None, "-")):
        row.found = deepcopy(started)
        rate = decode.measure([row], meter(powercap=counters), asked)
        decode.summarize(row, rate, asked)
        assert row.found["joules_per_token"] == joules
        assert row.found["decode_tokens_per_s"] > 0 and row.found["streams_tokens_per_s"] > 0
        out = Console(file=StringIO(), width=200)
        decode.show([row], rate, asked, out)
        assert out.file.getvalue().splitlines()[4].split("│")[-5].strip() == shown
    row.stop()
