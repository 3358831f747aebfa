# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at most, for ``bench/kernels.py`` to measure beside the kernels: how fast it reads memory,
and how many multiplications and additions of bytes and of floats it does."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fewbit.kernels import native
from peers.row import ROTATE, Call, Unavailable

SOURCE = Path(__file__).with_name("peak.cc")
ROUNDS = 100_000
"""Of ten chains: about 0.2 ms, as long as many a kernel, so that a busy machine interrupts both alike."""


@dataclass(frozen=True)
class Limit:
    """``calls``, each of which reads ``nbytes`` bytes or does ``operations``, and nothing else."""

    name: str
    how: str
    nbytes: int
    operations: float
    calls: list[Call]


def read_stream(threads: int) -> Limit:
    """Every byte of more memory than the last-level cache holds."""
    size = ROTATE // 16
    parts = [torch.empty(size, dtype=torch.uint8) for _ in range(16)]
    for part in parts:
        native.core().large_pages(part.data_ptr(), size)
        part.zero_()
    calls: list[Call] = [lambda p=p: native.core().read_stream(p.data_ptr(), size, threads) for p in parts]  # type: ignore[misc]
    return Limit("read stream", "memory", size, 0, calls)


@functools.cache
def compiled(source: Path) -> ctypes.CDLL:
    """``source`` as a library, for this very processor.

    Raises:
        Unavailable: there is no compiler, or it knows no instruction for this processor that the source wants.
    """
    compiler = shutil.which("c++")
    if compiler is None:
        raise Unavailable("no C++ compiler is found (c++); install one, e.g. apt-get install g++")
    with TemporaryDirectory() as folder:
        library = Path(folder) / f"{source.stem}.so"
        command = [compiler, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{source.name} does not compile here: {done.stderr.strip().splitlines()[0]}")
        return ctypes.CDLL(str(library))


def peaks(threads: int) -> list[Limit]:
    """The arithmetic peaks of ``threads`` threads: "int8 peak" and "float32 peak".

    Raises:
        Unavailable: as :func:`compiled`.
    """
    library = compiled(SOURCE)
    rounds = ROUNDS if threads == 1 else 10 * ROUNDS  # for waking the others to cost little
    pool = ThreadPoolExecutor(threads)
    found = []
    for key, symbol in (("int8", "peak_int8"), ("float32", "peak_float")):
        run, name = getattr(library, symbol), getattr(library, f"{symbol}_name")
        run.restype, run.argtypes, name.restype = ctypes.c_double, [ctypes.c_int64], ctypes.c_char_p

        def call(run: Callable[[int], float] = run) -> float:
            return run(rounds) if threads == 1 else sum(pool.map(run, [rounds] * threads))

        found.append(Limit(f"{key} peak", name().decode(), 0, call(), [call]))
    return found
