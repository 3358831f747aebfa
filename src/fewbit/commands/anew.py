# SPDX-License-Identifier: Apache-2.0
"""A command in a process that read no command line: typer and its pydantic take 9 MiB, and who serves holds them to the
end. So the process begins anew, the same command line and number, and finds what it said in the environment."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

SAID = "FEWBIT_SAID"
"""Variable of the environment, which no other user can read."""


def said() -> dict[str, Any] | None:
    """What the process before this one read; None where none did. Children are not told."""
    found = os.environ.pop(SAID, None)
    return None if found is None else json.loads(found)


def begin(command: str, request: dict[str, Any]) -> None:
    """Begin anew with ``request``, plain JSON data, which the words after ``command`` said. Returns where that cannot
    be: the system would make another process (Windows), this is some other program that called the command, or it was
    begun anew and read its command line again."""
    again = said() is not None
    if os.name == "posix" and sys.executable and sys.argv[1:2] == [command] and not again:
        os.execve(sys.executable, sys.orig_argv, os.environ | {SAID: json.dumps(request)})
