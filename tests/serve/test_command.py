# SPDX-License-Identifier: Apache-2.0
"""``fewbit serve`` as a person starts and stops it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fewbit.cli import app
from fewbit.commands import serve
from fewbit.errors import SpecError

httpx = pytest.importorskip("httpx")


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, words)])


ASKED = """
import sys
from fewbit.commands import serve
def run(request):
    print(request, [name for name in ("typer", "pydantic", "rich", "click") if name in sys.modules])
    raise serve.InputError(f"debug {request.port}")
serve.run = run
from fewbit.__main__ import main
main()
"""


@pytest.mark.skipif(os.name != "posix", reason="other systems begin no process anew")
def test_the_process_that_serves_is_told_all_and_holds_no_parser() -> None:
    words = ["wörter", "--port", "5", "--kv", "int8", "--embeddings", "--no-image", "--debug"]
    command = [sys.executable, "-c", ASKED, "serve", *words]
    environment = os.environ | {"FEWBIT_TOKEN": "not on the command line"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    asked = serve.Request(
        Path("wörter"), port=5, kv="int8", embeddings=True, image=False, token="not on the command line"
    )
    assert done.stdout == f"{asked} []\n"
    assert done.returncode == 3 and done.stderr.endswith("fewbit: debug 5\n") and "Traceback" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="other systems begin no process anew")
def test_one_that_cannot_begin_anew_serves_itself() -> None:
    reads_again = ASKED.replace("__main__", "cli")  # whatever began it
    done = subprocess.run(
        [sys.executable, "-c", reads_again, "serve", "x"], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{serve.Request(Path('x'))} ['typer', 'pydantic']\n" and done.returncode == 3
    assert done.stderr == "fewbit: debug 8000\n"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"origins": ["localhost:3000"]}, "it is no origin"),
        ({"origins": ["http://localhost:3000/"]}, "it is no origin"),
        ({"origins": ["*"], "no_token": True}, "any page could use the model"),
    ],
)
def test_origins_that_are_none_or_too_many_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(SpecError, match=found):
        serve.run(serve.Request(Path("nothing is read"), **options))


def test_nobody_reads_the_address() -> None:
    code = "import sys; from fewbit.commands import serve; serve.run = lambda request: print('x' * 9, flush=True)"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", f"{code}; serve.begun('x', False)"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_from_start_to_end(tiny: Path, end: signal.Signals) -> None:
    command = [sys.executable, "-m", "fewbit", "serve", str(tiny), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = process.stdout.readline()
            found = re.fullmatch(r"tiny at (http://127\.0\.0\.1:\d+)/#token=(\S{20,})\n", said)
            assert found, said
            headers = {"Authorization": f"Bearer {found[2]}"}
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "ignore_eos": True}
            answer = httpx.post(f"{found[1]}/v1/completions", json=body, headers=headers, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 5
            endless = {**body, "max_tokens": 500, "stream": True}
            with httpx.stream(
                "POST", f"{found[1]}/v1/completions", json=endless, headers=headers, timeout=60
            ) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(end)
                with contextlib.suppress(httpx.HTTPError):  # cut after the seconds of grace, unless it ends by then
                    list(lines)
            assert process.wait(30) == 0
            rest = process.stderr.read()
            assert "stopped" in rest and "Traceback" not in rest
            assert process.stdout.read() == ""  # the token is printed once
        finally:
            process.kill()


SHORT = "from fewbit.commands import serve; serve.GRACE = 0; from fewbit.__main__ import main; main()"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_what_does_not_end_in_time_ends_with_an_error(tiny: Path) -> None:
    command = [sys.executable, "-c", SHORT, "serve", str(tiny), "--port", "0", "--threads", "1", "--no-token"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            place = process.stdout.readline().split()[-1]
            body = {"model": "tiny", "prompt": "hello", "max_tokens": 500, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{place}v1/completions", json={**body, "n": 16}, timeout=60) as streamed:
                lines = streamed.iter_lines()
                next(lines)
                waiting = ThreadPoolExecutor(1).submit(
                    httpx.post, f"{place}v1/completions", json={**body, "n": 16, "stream": False}, timeout=60
                )
                while b"fewbit_waiting 16.0" not in httpx.get(f"{place}metrics").content:
                    next(lines)
                process.send_signal(signal.SIGTERM)  # which does as Ctrl-C
                last = [line for line in lines if line][-1]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == "stopping" and error["type"] == "server_error"
            assert waiting.result().status_code == 503
            assert process.wait(30) == 0 and "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = invoke(tmp_path, "--port", taken.getsockname()[1])
    assert result.exit_code == 3 and "--port" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--token", "short"), 2, "guessed"),
        (("--token", "with space in it"), 2, "guessed"),
        (("--token", "long-enough-token", "--no-token"), 2, "one of the two"),
        (("--kv", "int1"), 2, "int1"),
        (("--activation", "int99"), 2, "int99"),
        (("--host", "256.1.1.1"), 3, "listening"),
    ],
)
def test_options_that_cannot_be(tiny: Path, words: tuple[str, ...], code: int, says: str) -> None:
    result = invoke(tiny, "--port", "0", *words)
    assert result.exit_code == code and says in result.stderr, result.stderr


def test_a_folder_without_model_is_refused(tmp_path: Path, byte_tokenizer: Callable[[Path], int]) -> None:
    assert "config.json" in invoke(tmp_path, "--port", "0").stderr
    (tmp_path / "config.json").write_text("{}")
    result = invoke(tmp_path, "--port", "0")
    assert result.exit_code == 3 and "tokenizer" in result.stderr


def test_without_the_extra_the_install_line_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("starlette", "no_such_module_here"))
    result = invoke(tiny)
    assert result.exit_code == 4 and "fewbit[serve]" in result.stderr
