# SPDX-License-Identifier: Apache-2.0
"""Chat templates, which are programs from a model's folder: rendered in another process, for a bounded time."""

from __future__ import annotations

import json
import os
import signal
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
IDLE = 30.0
"""Seconds without a template after which the process ends: it holds 9 MiB, and starts in 0.1 s of processor time."""
BOOT = "import sys; sys.path[:] = sys.argv[2:]; exec(compile(open(sys.argv[1], 'rb').read(), sys.argv[1], 'exec'))"
"""Runs the script where this process looks for packages: not in the script's folder, nor in the one that it is
started in, which may be the model's, and whose json.py would else be run."""


class Templates:
    """A process that renders one template after the other; it starts with the first one, ends when none has come for
    ``idle`` seconds, and starts again with the next, as it does where a template ended it."""

    def __init__(self, seconds: float = SECONDS, patience: float = PATIENCE, idle: float = IDLE) -> None:
        self._seconds, self._patience, self._idle = seconds, patience, idle
        self._one = threading.Lock()  # held by whoever uses the process, and to change which it is
        self._process: subprocess.Popen[str] | None = None
        self._resting: threading.Timer | None = None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        """The text that ``template`` makes of ``values``, plain JSON data.

        Raises:
            InputError: it refuses them, is wrong, would leave the sandbox, or takes too long or too much memory.
        """
        asked = json.dumps({"template": template, "values": values, "seconds": self._seconds})
        if not self._one.acquire(timeout=self._patience):
            raise InputError("the chat template", "others have been rendering all the time", "try again later")
        try:
            self._rouse()
            found = self._answer(asked)
            self._rest()
        finally:
            self._one.release()
        if "error" in found:
            raise InputError("the chat template", f"it refuses these messages: {found['error']}"[:300])
        return str(found["text"])

    def _answer(self, asked: str) -> dict[str, str]:
        """Of a process that has been waiting, or else of a new one: whatever may have ended the former is no fault of
        this template, unless it is one of the bounds."""
        waiting = self._process is not None
        line, why = self._ask(asked)
        if waiting and not (line or why):
            line, why = self._ask(asked)
        found: dict[str, str] = json.loads(line) if line else {"error": why or "it ended the process that renders it"}
        return found

    def _ask(self, asked: str) -> tuple[str, str]:
        """The line of the answer, and which bound ended the process before it; both empty where something else did."""
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(self._patience, give_up)
        watch.start()
        try:
            process.stdin.write(asked + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            line = ""
        finally:
            watch.cancel()
        if line.endswith("\n"):
            return line, ""
        self._end()
        timed = hasattr(signal, "SIGPROF") and process.returncode == -signal.SIGPROF
        return "", f"it took more than {self._seconds:g} s of processor time" if timed or late.is_set() else ""

    def _rest(self) -> None:
        """End the process, unless it is used before it has been idle too long."""
        self._resting = threading.Timer(self._idle, self._rested)
        self._resting.daemon = True
        self._resting.start()

    def _rouse(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None

    def _rested(self) -> None:
        with self._one:
            if self._resting is threading.current_thread():  # nobody came while this one waited for the lock
                self._resting = None
                self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def close(self) -> None:
        """End the process, and so what it is rendering; the next template starts another one."""
        if (process := self._process) is not None:
            process.kill()
        with self._one:
            self._rouse()
            self._end()


def _start() -> subprocess.Popen[str]:
    """Without what the installation runs at the start of Python (-S), which takes time and memory."""
    return subprocess.Popen(
        [sys.executable, "-S", "-c", BOOT, str(Path(__file__).with_name("render.py")), *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith("FEWBIT_")},  # the token
        text=True,
        encoding="utf-8",
    )
