# SPDX-License-Identifier: Apache-2.0
"""A page in Chromium, without window: its DevTools protocol over two pipes, messages of JSON that end with a zero."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENTER = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}


class Page:
    """``read``, ``write``: file descriptors. ``events``: what the browser told unasked."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb"), write
        self._held, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        asked = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            more = os.read(self._read.fileno(), 1 << 20)
            assert more, "the browser ended"
            self._held += more
        one, _, self._held = self._held.partition(b"\0")
        return dict(json.loads(one))

    def value(self, expression: str) -> Any:
        """What ``expression``, JavaScript, is in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Wait for ``expression`` to become true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression}; the page: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def write(self, text: str) -> None:
        """Type ``text`` and Enter where the focus is."""
        self.call("Input.insertText", text=text)
        self.call("Input.dispatchKeyEvent", type="keyDown", **ENTER)
        self.call("Input.dispatchKeyEvent", type="keyUp", **ENTER)


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Page]:
    """A new page of ``program``, which reads its descriptor 3 and writes 4; ``profile``: an empty folder."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    shell = 'exec "$@" 3<&"$IN" 4>&"$OUT"'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command, f"--user-data-dir={profile}"],
        env={**os.environ, "IN": str(theirs_in), "OUT": str(theirs_out)},
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in), os.close(theirs_out)
    try:
        yield Page(ours_in, ours_out)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
