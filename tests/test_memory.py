# SPDX-License-Identifier: Apache-2.0
"""What was freed stays while it is used again, and leaves the process where it is much."""

import platform
import subprocess
import sys

import pytest

from fewbit import memory

CHURN = """
import re, runpy, sys, torch
give_back = runpy.run_path(sys.argv[1])["give_back"]
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

BATCHES = """
import resource, torch
from threading import Thread
import fewbit.run  # all that a run imports, without which malloc learns otherwise
from fewbit.memory import keep
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def batches(number):
    for _ in range(number):
        [torch.ones(1 << 20) for _ in range(8)]
keep() if KEEP else None
before = faults()
worker = Thread(target=batches, args=(20,))
worker.start()
worker.join()
print((faults() - before) * resource.getpagesize() >> 20)
"""


def printed(text: str) -> str:
    """By ``text`` in a process of its own, which may read the module alone: all that runs import takes seconds."""
    command = [sys.executable, "-c", text, memory.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps such pools")
def test_blocks_of_a_batch_are_kept_from_the_first_on() -> None:
    def faulted(keep: bool) -> int:
        return int(printed(BATCHES.replace("KEEP", str(keep))))

    assert faulted(keep=True) < 160 < 320 < faulted(keep=False)  # MiB: a batch has 32, and there are 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps such pools")
def test_freed_blocks_leave_the_process() -> None:
    kept, left = map(int, printed(CHURN).split())  # MiB, of 384
    assert kept > 256  # what giving back is for
    assert left < 16
