# SPDX-License-Identifier: Apache-2.0
"""``bench/serve.py`` as it is called."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "serve.py"
STORIES = Path("/work/shared/assets/stories15m")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (STORIES / "config.json").is_file(), reason="the shared model stories15m is not here")
def test_nothing_goes_wrong_in_a_few_seconds(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    folder, told = tmp_path / "stories", tmp_path / "told.json"
    shutil.copytree(STORIES, folder)  # where the server may keep its image
    command = [sys.executable, str(BENCH), str(folder), "--clients", "5", "--seconds", "3", "--json", str(told)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(told.read_text())
    assert found["wrong"] == [] and found["other"] == 0 and found["requests"] > 0
