# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ test programs: under sanitizers, and for aarch64.

``python tests/kernels/programs.py FOLDER`` builds those that CI runs below FOLDER with nothing but Python, CMake and
compilers; tests take what they find below ``FEWBIT_PROGRAMS``, so that it can be built while packages are installed.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {"neon": ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64"), "addresses": ("cmake", "c++")}
"""Of the programs that CI runs, that which runs longest first."""
OPTIONS = {
    "addresses": ("-DFEWBIT_SANITIZE=address,undefined", "-DCMAKE_CXX_FLAGS=-Og"),
    "threads": ("-DFEWBIT_SANITIZE=thread", "-DCMAKE_CXX_FLAGS=-Og"),
    "neon": (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        "-DCMAKE_CXX_FLAGS=-Og",
    ),
}


def missing(*tools: str) -> str:
    return ", ".join(tool for tool in tools if shutil.which(tool) is None)


def build(name: str, parent: Path) -> Path:
    """The test program, built in ``parent / name`` by one process at a time. Inner loops are not unrolled, and ``-Og``
    leaves out what optimizes longest: that only saves the compiler time. Says which instruction sets a sanitizer leaves
    out, as this processor has none of them.

    Raises:
        RuntimeError: the build failed; its last words.
    """
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ("-DFEWBIT_TESTS=ON", "-DFEWBIT_UNROLL=1", "-DCMAKE_BUILD_TYPE=None", *OPTIONS[name])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *options],
            ["cmake", "--build", str(folder), "--parallel", "2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
            for line in done.stdout.splitlines():
                if "not sanitized" in line:
                    print(f"{name}: {line.removeprefix('-- fewbit: ')}")
    return folder / "fewbit_test"


if __name__ == "__main__":
    for program, tools in NEEDED.items():
        print(f"{program}: not installed: {missing(*tools)}" if missing(*tools) else build(program, Path(sys.argv[1])))
