# SPDX-License-Identifier: Apache-2.0
"""The C++ test program: under sanitizers here (addresses and undefined behaviour; threads), for aarch64 under qemu."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def missing(*tools: str) -> str:
    return ", ".join(tool for tool in tools if shutil.which(tool) is None)


def build(folder: Path, *options: str) -> Path:
    """The test program, built in ``folder``. Inner loops are not unrolled: that only saves the compiler time."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ("-DFEWBIT_TESTS=ON", "-DFEWBIT_UNROLL=1", "-DCMAKE_BUILD_TYPE=None", *options)
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "fewbit_test"


RACES = pytest.mark.skipif("FEWBIT_RACES" not in os.environ, reason="minutes more: set FEWBIT_RACES=1")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing("cmake", "c++")), reason=f"not installed: {missing('cmake', 'c++')}")
@pytest.mark.parametrize(
    ("sanitizer", "optimize"), [("address,undefined", "-O0"), pytest.param("thread", "-O1", marks=RACES)]
)
def test_kernels_touch_no_byte_that_is_not_theirs(tmp_path: Path, sanitizer: str, optimize: str) -> None:
    program = build(tmp_path, f"-DFEWBIT_SANITIZE={sanitizer}", f"-DCMAKE_CXX_FLAGS={optimize}")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout and "serial: at most" in done.stdout


CROSS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="cross-compiles from x86-64")
@pytest.mark.skipif(bool(missing(*CROSS)), reason=f"not installed: {missing(*CROSS)}")
def test_neon_under_qemu(tmp_path: Path) -> None:
    program = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        "-DCMAKE_CXX_FLAGS=-O1",
    )
    done = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout and "neon: at most" in done.stdout
    assert "vector on neon\n" in done.stdout
    assert all(f"int8 on {isa}\n" in done.stdout for isa in ("neon", "neondot", "neoni8mm"))
    assert "xnor on neon\n" in done.stdout
    assert "sparse on neon\n" in done.stdout and "windows on neon\n" in done.stdout
