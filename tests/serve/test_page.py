# SPDX-License-Identifier: Apache-2.0
"""The chat page in a real browser, as a person uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, chromium

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
TOKEN = "a-token-for-tests"
WRITTEN = "document.getElementById('stop').hidden && document.getElementById('talk').children.length"

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here"),
    pytest.mark.slow,
    pytest.mark.timeout(400),
]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    assert PROGRAM is not None
    with chromium(PROGRAM, tmp_path) as page:
        yield page
    refused = [event for event in page.events if "Content Security Policy" in str(event.get("params"))]
    thrown = [event for event in page.events if event.get("method") == "Runtime.exceptionThrown"]
    assert not refused and not thrown


def talk(page: Page) -> list[str]:
    return list(page.value("[...document.getElementById('talk').children].map(one => one.textContent)"))


def test_a_conversation(fake: Callable[..., Any], page: Page) -> None:
    running = fake()
    page.call("Page.navigate", url=f"{running.url}/#token={TOKEN}")
    page.until("document.getElementById('model').textContent === 'fake'")
    assert page.value("location.href") == f"{running.url}/"  # the token is no longer to be seen
    page.value("document.getElementById('temperature').value = 0")
    page.value("document.getElementById('max_tokens').value = 20")
    said: list[dict[str, str]] = []
    for text in ("Grüße <b>you</b> 😀", "and you?"):
        page.write(text)
        page.until(f"{WRITTEN} === {3 * (len(said) // 2 + 1)}")
        said.append({"role": "user", "content": text})
        body = {"model": "fake", "messages": said, "max_tokens": 20, "temperature": 0}
        answer = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        said.append({"role": "assistant", "content": answer})
        assert talk(page)[-3:-1] == [text, answer]
        assert talk(page)[-1].startswith("20 tokens, ") and talk(page)[-1].endswith("tokens/s, cut off")
    page.value("document.getElementById('temperature').value = -3")
    page.write("hi")
    page.until(f"{WRITTEN} === 8")
    assert talk(page)[-1] == "temperature -3; a number from 0 to 100 would work"


def test_an_answer_is_stopped(fake: Callable[..., Any], page: Page) -> None:
    running = fake(seconds=0.05)
    page.call("Page.navigate", url=f"{running.url}/#token={TOKEN}")
    page.until("document.getElementById('model').textContent === 'fake'")
    page.write("for ever")
    page.until("document.getElementById('talk').lastChild.textContent.length > 3")
    page.value("document.getElementById('stop').click()")
    page.until(f"{WRITTEN} === 3")
    assert talk(page)[-1] == "stopped"


def test_a_token_that_comes_later(fake: Callable[..., Any], page: Page) -> None:
    running = fake()
    page.call("Page.navigate", url=running.url)
    page.until("!document.getElementById('login').hidden")
    assert talk(page) == [] and page.value("document.getElementById('ask').hidden")
    page.write("another-token")
    page.until("document.getElementById('talk').children.length === 1")
    assert "not the token" in talk(page)[0]
    page.call("Page.navigate", url=f"{running.url}/#token={TOKEN}")  # which the browser does not load anew
    page.until("document.getElementById('model').textContent === 'fake'")
    assert page.value("location.href") == f"{running.url}/" and page.value("document.getElementById('login').hidden")


def test_code_is_set_apart(fake: Callable[..., Any], page: Page) -> None:
    """By elements, never by markup of the text; what the answer says is all there, marks included."""
    page.call("Page.navigate", url=f"{fake().url}/#token={TOKEN}")
    page.until("document.getElementById('model').textContent === 'fake'")
    said = "Call `f(1)`:\n\n```python\ndef f(x):\n    return `<b>`\n```\n\n<i>so</i> ` it\n```\nopen\n\n"
    page.value(f"render(window.answer = show('assistant', ''), {json.dumps(said)})")
    assert page.value("answer.textContent") == said
    assert page.value("[...answer.querySelectorAll('code')].map(one => one.textContent)") == ["f(1)"]
    assert page.value("[...answer.querySelectorAll('pre')].map(one => one.textContent)") == [
        "def f(x):\n    return `<b>`\n",
        "open",
    ]
    assert "```" not in page.value("answer.innerText") and "<i>so</i> ` it" in page.value("answer.innerText")
