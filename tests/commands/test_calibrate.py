# SPDX-License-Identifier: Apache-2.0
"""``fewbit calibrate`` and what ``fewbit quantize --facts`` makes of it, as scripts call them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Command = Callable[..., Result]
TEXT = ("--samples", "4", "--context", "64")


def test_collect_merge_quantize_inspect(tiny: Path, command: Command, tmp_path: Path) -> None:
    one, two, both, out = (tmp_path / name for name in ("one", "two", "both", "out"))
    result = command("calibrate", tiny, "-o", one, "--no-gram", *TEXT, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["collected"] == ["mean_square", "fisher", "ranges"]
    result = command("calibrate", tiny, "-o", two, "--no-gram", *TEXT, "--seed", "1")
    assert result.exit_code == 0 and "4 windows, 256 tokens" in result.stdout
    result = command("calibrate", tiny, "-o", both, "--merge", one, "--merge", two)
    assert result.exit_code == 0, result.stderr
    assert "8 windows, 512 tokens" in result.stdout
    result = command("inspect", both)
    assert result.exit_code == 0 and "facts of a calibration" in result.stdout, result.stderr
    assert "8 windows, 512 tokens" in result.stdout and "Hugging Face" not in result.stdout
    (both / "fisher-00000.safetensors").write_bytes(b"other")
    assert command("inspect", both).exit_code != 0
    result = command("calibrate", tiny, "-o", both, "--merge", one, "--merge", two, "--force")
    result = command("quantize", tiny, "-o", out, "-f", "palette3/rows16", "-m", "squeezellm", "--facts", both)
    assert result.exit_code == 0, result.stderr
    assert "palette3/rows16 + sparse" in result.stdout
    result = command("inspect", out)
    assert result.exit_code == 0 and "palette3/rows16 + sparse" in result.stdout
    result = command("quantize", tiny, "-o", tmp_path / "not", "-f", "int4/g32", "-m", "gptq", "--facts", both)
    assert result.exit_code == 3 and "--no-gram" in result.stderr


def test_a_plan_tells_what_facts_fix_and_what_they_lack(tiny: Path, command: Command, tmp_path: Path) -> None:
    facts, asked = tmp_path / "facts", ("-f", "W8A8_STATIC", "--head", "float")
    result = command("calibrate", tiny, "-o", facts, "--no-gram", "--no-fisher", *TEXT)
    assert result.exit_code == 0, result.stderr
    for more, grid in (((), "int8/static/asym/mse"), (("--facts", facts), r"int8/static/asym/s[\d.e-]+/z\d+")):
        shown = command("plan", tiny, *asked, *more, "--json", tmp_path / "plan.json")
        assert shown.exit_code == 0 and "inputs" in shown.stdout, shown.stderr
        planned = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["layers"]
        grids = [layer["activation"] for layer in planned if layer["method"]]
        assert len(grids) == 14 and all(re.fullmatch(grid, each) for each in grids)
    assert "inputs" not in command("plan", tiny, "-f", "int4/g32", "--facts", facts).stdout
    for more, words in (
        (("-f", "int4/g32", "-m", "gptq"), "--no-gram"),
        (("-f", "int4/g32", "-m", "clip", "--tune", "scales"), "--calibration TEXT and no --facts"),
        ((*asked, "--transform", "rotate"), "rewrites its inputs"),
    ):
        refused = command("plan", tiny, *more, "--facts", facts)
        assert refused.exit_code in (2, 3) and words in refused.stderr and refused.stdout == ""
