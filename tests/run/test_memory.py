# SPDX-License-Identifier: Apache-2.0
"""Large tensors that were freed do not stay with the process."""

import platform
import subprocess
import sys

import pytest

CHURN = """
import re, sys, torch
from fewbit.run.memory import LARGE, return_large_blocks
if sys.argv[1] == "set":
    return_large_blocks()
def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
def tensors():
    return torch.ones(LARGE // 4 + 1000), torch.ones(5000)
tensors()  # freed at once: from here on glibc would keep blocks of this size in its pool
before = resident()
pairs = [tensors() for _ in range(32)]
small = [pair[1] for pair in pairs]  # what lives on between them holds the pool's pages
del pairs
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps such pools")
def test_freed_blocks_leave_the_process() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert kept("set") < 16  # MiB, of 128
    assert kept("leave") > 64  # what the setting is for
