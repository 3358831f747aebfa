# SPDX-License-Identifier: Apache-2.0
"""Errors as a user meets them: one sentence on stderr, the right exit code, a traceback only on demand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fewbit
from fewbit import errors
from fewbit.commands.guard import INTERRUPTED, TERMINATED, guarded, sentence


def all_kinds(root: type[errors.FewbitError]) -> list[type[errors.FewbitError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in all_kinds(child))]


def app_raising(error: BaseException) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @guarded
    def fail(debug: bool = False) -> None:
        raise error

    return app


@pytest.mark.parametrize("kind", all_kinds(errors.FewbitError), ids=lambda kind: kind.__name__)
def test_refusal_is_one_sentence_with_its_code(kind: type[errors.FewbitError]) -> None:
    result = CliRunner().invoke(app_raising(kind("asked\nthis", "found that", "this works")), [])
    assert result.exit_code == kind.exit_code
    assert result.stderr == "fewbit: asked this; found that; this works\n"
    assert result.stdout == ""


def test_codes_differ_by_kind() -> None:
    codes = {kind.exit_code for kind in all_kinds(errors.FewbitError)}
    assert codes == {1, 2, 3, 4, 5, 6, 7}


def test_debug_shows_the_traceback_too() -> None:
    result = CliRunner().invoke(app_raising(errors.SpecError("asked")), ["--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("fewbit: asked\n")


def test_unexpected_error_names_the_way_to_more() -> None:
    result = CliRunner().invoke(app_raising(ZeroDivisionError("a\nb")), [])
    assert result.exit_code == 1
    assert result.stderr == "fewbit: unexpected ZeroDivisionError: a b; run with --debug for the traceback\n"


def test_interrupt_and_system_errors() -> None:
    assert sentence(KeyboardInterrupt()) == (INTERRUPTED, 130)
    message, code = sentence(OSError(28, "No space left on device", "out/model"))
    assert code == 3
    assert message.startswith("out/model: No space left on device")
    assert sentence(MemoryError())[1] == 1


def test_interrupt_through_the_command() -> None:
    result = CliRunner().invoke(app_raising(KeyboardInterrupt()), [])
    assert (result.exit_code, result.stderr) == (130, f"fewbit: {INTERRUPTED}\n")


def test_warnings_are_lines_and_programmers_warnings_are_hidden() -> None:
    app = typer.Typer()

    @app.command()
    @guarded
    def warn(debug: bool = False) -> None:
        warnings.simplefilter("always")
        warnings.warn("slow\nhere", UserWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)

    before = warnings.showwarning
    result = CliRunner().invoke(app, [])
    assert result.stderr == "warning: slow here\n"
    assert warnings.showwarning is before


def test_sigterm_is_the_programs_own_again_afterwards() -> None:
    """And where it is ignored, or somebody's already, commands leave it alone."""
    app, found = typer.Typer(), list[object]()

    @app.command()
    @guarded
    def look(debug: bool = False) -> None:
        found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, handler)
            assert CliRunner().invoke(app, []).exit_code == 0
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert callable(found[0]) and found[1] is signal.SIG_IGN


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "says"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_a_signal_to_a_real_process(tiny: Path, tmp_path: Path, number: signal.Signals, says: str) -> None:
    """Ctrl-C or SIGTERM in the middle of a run: exit 128 + its number, and the sentence."""
    out = tmp_path / "out"
    options = ["--format", "int4/g32", "--method", "gptq", "--samples", "128", "--context", "256", "-o", str(out)]
    start = "import sys; from fewbit.cli import app; sys.argv[0] = 'fewbit'; app()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(fewbit.__file__).parents[1]), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", start, "quantize", str(tiny), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell that runs the tests in the background has signals ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not out.with_name("out.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert says in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
