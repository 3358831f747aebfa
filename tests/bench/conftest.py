# SPDX-License-Identifier: Apache-2.0
"""A way to run the commands of ``bench/`` in this process: a process of their own imports torch for seconds."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewbit import kernels

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``command("rows.py", ...)`` as from a shell: (exit code, what it and its children printed). Its folder leaves
    ``sys.path`` at once, as transformers looks for a package ``kernels``; threads and random numbers are as before."""

    def run(script: str, *words: object) -> tuple[int, str]:
        threads, code = torch.get_num_threads(), 0
        with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng(devices=[]):
            patched.setattr(sys, "argv", [str(BENCH / script), *map(str, words)])
            patched.setattr(sys, "path", [str(BENCH), *sys.path])
            try:
                runpy.run_path(str(BENCH / script), run_name="__main__")
            except SystemExit as ended:
                assert ended.code is None or isinstance(ended.code, int), ended.code
                code = ended.code or 0
            finally:
                torch.set_num_threads(threads)
                kernels.set_threads(None)
        return code, capfd.readouterr().out

    return run
