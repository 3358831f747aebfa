# SPDX-License-Identifier: Apache-2.0
"""Chat templates, which are programs from a model's folder: rendered in another process, for a bounded time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.errors import InputError

SECONDS = 2.0
"""Of processor time that a template may take."""
PATIENCE = 15.0
"""Seconds after which one that waits, or a machine that is far too busy, is given up."""
BOOT = "import sys; sys.path[:] = sys.argv[2:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Starts the script where this process looks for packages: not in the script's folder, nor in the one that it is
started in, which may be the model's, and whose json.py would else be run."""


class Templates:
    """A process that renders one template after the other; started with the first one, and again where one ended it."""

    def __init__(self, seconds: float = SECONDS, patience: float = PATIENCE) -> None:
        self._seconds, self._patience = seconds, patience
        self._one = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The text that ``template`` makes of ``values``, plain JSON data.

        Raises:
            InputError: it refuses them, is wrong, would leave the sandbox, or takes too long or too much memory.
        """
        asked = json.dumps({"template": template, "values": values, "seconds": self._seconds})
        if not self._one.acquire(timeout=self._patience):
            raise InputError("the chat template", "others have been rendering all the time", "try again later")
        try:
            line = self._ask(asked)
            if not line.endswith("\n"):
                self.close()
        finally:
            self._one.release()
        found = json.loads(line) if line.endswith("\n") else {"error": self._too_much()}
        if "error" in found:
            raise InputError("the chat template", f"it refuses these messages: {found['error']}"[:300])
        return str(found["text"])

    def _too_much(self) -> str:
        return f"it took more than {self._seconds:g} s of processor time, or too much memory"

    def _ask(self, asked: str) -> str:
        """The line of the answer; an empty one where the process has ended."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(Path(__file__).with_name("render.py")), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.startswith("FEWBIT_")},  # the token
                text=True,
                encoding="utf-8",
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(self._patience, process.kill)
        watch.start()
        try:
            process.stdin.write(asked + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:
            return ""
        finally:
            watch.cancel()

    def close(self) -> None:
        """End the process; the next template starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
