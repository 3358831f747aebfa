# SPDX-License-Identifier: Apache-2.0
"""Chat templates make the text that transformers makes of them, and end in time whatever they do."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fewbit.decode.render import LONGEST
from fewbit.decode.templates import Templates
from fewbit.errors import InputError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Is "é\n" <b>one</b> line?'},
    {"role": "assistant", "content": " No. "},
]
TEMPLATES = {
    "tags": """{{ bos_token }}
    {%- for message in messages %}
        {%- if loop.first and message.role == 'system' %}
            {%- continue %}
        {%- endif %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] | trim + eos_token }}
    {%- endfor %}
    {% if add_generation_prompt %}<|assistant|>{% endif %}
""",
    "names": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m %}"
    "{% if ns.n == 2 %}{% break %}{% endif %}{% endfor %}{{ ns.n }} {{ ns.last | tojson }} {{ dict(a=1)['a'] }}",
    "json": "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ messages[1].missing is defined }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}[{{ x }}]{% endgeneration %}{% endfor %}",
    "macro": "{% macro say(m) -%}  {{ m | upper }} {%- endmacro %}{% for m in messages %}{{ say(m.role) }}{% endfor %}",
}
VALUES: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    made = Templates(seconds=1.0)
    yield made
    made.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(templates: Templates, name: str) -> None:
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=TEMPLATES[name], **VALUES)
    values = {"messages": MESSAGES, "tools": None, "documents": None, **VALUES}
    assert templates.render(TEMPLATES[name], values) == expected


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
            "{% endfor %}",
            "processor time",
        ),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "Recursion"),
        ("{{ 'x' * 10 ** 11 }}", "Memory"),
        ("{{ 9 ** (9 ** 9) }}", "processor time"),
        (f"{{{{ 'x' * {LONGEST + 1} }}}}", "characters"),
        ("{% set n = namespace(__class__=1) %}", "private"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_template_that_takes_too_much_is_refused_and_others_go_on(
    templates: Templates, template: str, found: str
) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=found):
        templates.render(template, {"messages": MESSAGES})
    assert time.monotonic() - began < 60
    assert templates.render("{{ messages | length }}", {"messages": MESSAGES}) == "3"


def test_the_process_is_told_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_TOKEN", "secret")
    templates = Templates()
    templates.render("x", {})
    assert templates._process is not None
    environment = Path(f"/proc/{templates._process.pid}/environ")
    if not environment.is_file():
        pytest.skip("no /proc here")
    assert b"PATH=" in environment.read_bytes() and b"secret" not in environment.read_bytes()
    templates.close()


def test_where_the_system_has_no_timer_the_clock_ends_it() -> None:
    templates = Templates(seconds=1e9, patience=1.0)
    with pytest.raises(InputError, match="processor time"):
        templates.render("{{ 9 ** (9 ** 9) }}", {})
    templates.close()


def test_files_of_the_working_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "runpy", "datetime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    one = Templates()
    try:
        assert one.render("{{ word }}", {"word": "as ever"}) == "as ever"
    finally:
        one.close()


def process_of(templates: Templates) -> subprocess.Popen[str]:
    found = templates._process
    assert found is not None
    return found


def until_ended(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while process.returncode is None:  # set by who waits for it: nothing of it is left then
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def test_one_that_nobody_needs_ends_and_another_begins() -> None:
    templates = Templates(idle=0.3)
    try:
        for word in ("one", "two"):
            assert templates.render("{{ word }}", {"word": word}) == word
            until_ended(process_of(templates))
        assert templates._process is None
    finally:
        templates.close()


def test_one_that_is_needed_goes_on() -> None:
    templates = Templates(idle=3)
    try:
        templates.render("x", {})
        first, until = process_of(templates), time.monotonic() + 4
        while time.monotonic() < until:
            templates.render("x", {})
            time.sleep(0.2)
        assert process_of(templates) is first
    finally:
        templates.close()


def test_one_that_the_system_ended_while_it_waited_is_replaced() -> None:
    templates = Templates()
    try:
        templates.render("x", {})
        for seconds in (0.0, 0.2):
            process_of(templates).kill()
            time.sleep(seconds)
            assert templates.render("{{ word }}", {"word": "as ever"}) == "as ever"
    finally:
        templates.close()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_template_that_crashes_is_refused_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = Templates()
    start = subprocess.Popen

    def crash(*words: object, **named: object) -> subprocess.Popen[str]:
        started: subprocess.Popen[str] = start(*words, **named)  # type: ignore[call-overload]
        os.kill(started.pid, signal.SIGSEGV)
        return started

    try:
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", crash)
            with pytest.raises(InputError, match="ended the process"):
                templates.render("x", {})
        assert templates.render("x", {}) == "x"
    finally:
        templates.close()


def test_ends_and_starts_lose_no_text() -> None:
    templates = Templates(idle=0.001)
    pauses = random.Random(1)

    def ask(number: int) -> str:
        time.sleep(pauses.random() * 0.05)
        return templates.render("{{ number }}", {"number": number})

    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(12))) == [str(number) for number in range(12)]
    finally:
        templates.close()


def test_one_that_is_closed_while_it_renders_ends() -> None:
    templates = Templates(seconds=20, patience=20)
    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(templates.render, "{{ 9 ** (9 ** 9) }}", {})
        while templates._process is None:
            time.sleep(0.01)
        time.sleep(0.5)
        process = process_of(templates)
        began = time.monotonic()
        templates.close()
        assert time.monotonic() - began < 10 and process.returncode is not None and templates._process is None
        with pytest.raises(InputError, match="ended the process"):
            rendering.result()
