# SPDX-License-Identifier: Apache-2.0
"""The C++ test program: under sanitizers here (addresses and undefined behaviour; threads), for aarch64 under qemu."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
from programs import NEEDED, build, missing

RACES = pytest.mark.skipif("FEWBIT_RACES" not in os.environ, reason="minutes more: set FEWBIT_RACES=1")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Where programs are built: below ``FEWBIT_PROGRAMS`` if that is set, where CI has begun to build them."""
    return Path(os.environ.get("FEWBIT_PROGRAMS", tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(bool(missing(*NEEDED["addresses"])), reason=f"not installed: {missing(*NEEDED['addresses'])}")
@pytest.mark.parametrize("sanitizer", ["addresses", pytest.param("threads", marks=RACES)])
def test_kernels_touch_no_byte_that_is_not_theirs(programs: Path, sanitizer: str) -> None:
    program = build(sanitizer, programs)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout and "serial: at most" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="cross-compiles from x86-64")
@pytest.mark.skipif(bool(missing(*NEEDED["neon"])), reason=f"not installed: {missing(*NEEDED['neon'])}")
def test_neon_under_qemu(programs: Path) -> None:
    program = build("neon", programs)
    done = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout and "neon: at most" in done.stdout
    assert "vector on neon\n" in done.stdout
    assert all(f"int8 on {isa}\n" in done.stdout for isa in ("neon", "neondot", "neoni8mm"))
    assert "xnor on neon\n" in done.stdout
    assert "sparse on neon\n" in done.stdout and "windows on neon\n" in done.stdout
