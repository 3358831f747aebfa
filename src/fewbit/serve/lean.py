# SPDX-License-Identifier: Apache-2.0
"""uvicorn without its command line: the package imports that, click, and supervisors of other processes, 1.6 MiB."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

NAME = "uvicorn.main"


def without_command_line() -> None:
    """Put an empty module in the place of what is not needed. Call it before the first import of uvicorn, in a process
    that serves and does nothing else; later it does nothing."""
    if "uvicorn" not in sys.modules:
        empty: Any = ModuleType(NAME)
        empty.__getattr__ = lambda name: None  # whatever the package takes from it
        sys.modules[NAME] = empty
