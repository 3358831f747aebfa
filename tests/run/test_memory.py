# SPDX-License-Identifier: Apache-2.0
"""What was freed leaves the process."""

import platform
import subprocess
import sys

import pytest

CHURN = """
import re, torch
from fewbit.run.memory import give_back
def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
def tensors():
    return torch.ones(1 << 20), torch.ones(5000)
tensors()  # freed at once: from here on glibc keeps blocks of this size in its pool
before = resident()
pairs = [tensors() for _ in range(96)]
small = [pair[1] for pair in pairs]  # what lives on between them holds the pool's pages
del pairs
kept = resident() - before
give_back()
print(kept, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps such pools")
def test_freed_blocks_leave_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())  # MiB, of 384
    assert kept > 256  # what giving back is for
    assert left < 16
