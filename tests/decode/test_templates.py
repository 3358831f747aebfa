# SPDX-License-Identifier: Apache-2.0
"""Chat templates make the text that transformers makes of them, and end in time whatever they do."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
