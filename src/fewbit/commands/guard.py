# SPDX-License-Identifier: Apache-2.0
"""What a user sees when a command cannot do what was asked: one sentence and an exit code, never a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from fewbit.core import given
from fewbit.errors import FewbitError

P = ParamSpec("P")
INTERRUPTED = "interrupted; nothing is lost, run the same command again to continue"
TERMINATED = INTERRUPTED.replace("interrupted", "terminated")
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: what ends commands for others (``docker stop``, Slurm, systemd) does as Ctrl-C does."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command: errors become a sentence on stderr and an exit code: 2 to 7 by kind, 1 unexpected, 130
    Ctrl-C, 143 SIGTERM.

    The command must take ``debug``; with it the traceback is printed as well. ``~`` in paths is the user's home, which
    shells do not say for us in ``--out=~/x``.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            with _terminable(), warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, **{name: _at_home(name, value) for name, value in kwargs.items()})
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            message, code = sentence(error)
            print(f"fewbit: {message}", file=sys.stderr)
            raise SystemExit(code) from None

    return run


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` while open, unless this program or who started it deals with it already."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()  # no other thread may ask for signals
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _at_home(name: str, value: Any) -> Any:
    """A path, or a list of them, with the user's home in place of ``~``; all else as it is."""
    if isinstance(value, list):
        return [_at_home(name, each) for each in value]
    return given.place(name, value) if isinstance(value, Path) else value


def sentence(error: BaseException) -> tuple[str, int]:
    """One line for a person, and the exit code for a script."""
    if isinstance(error, Terminated):
        return TERMINATED, 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, 130
    if isinstance(error, FewbitError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; what was finished is kept; fewer --samples or a shorter --context need less", 1
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; what was finished is kept, run the same command again to continue", 3
    text = " ".join(str(error).split()) or "no message"
    return f"unexpected {type(error).__name__}: {text[:500]}; run with --debug for the traceback", 1


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Warnings meant for users are one line; those meant for programmers are not shown."""
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
