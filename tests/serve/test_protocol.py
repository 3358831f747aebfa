# SPDX-License-Identifier: Apache-2.0
"""What clients get wrong, who may ask, and what happens when they leave: the server answers, and lives."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from fewbit.decode.batch import Limits
from fewbit.decode.templates import Templates
from fewbit.serve import body as B

httpx = pytest.importorskip("httpx")
GOOD = {"model": "fake", "prompt": "hello", "max_tokens": 3, "temperature": 0}


def text_of(running: Any) -> str:
    response = running.post("/v1/completions", GOOD)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def error_of(response: Any) -> dict[str, Any]:
    found = response.json()
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": True}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": "a"}, "presence_penalty"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": 508}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ""}, None),
        ({"stop": ["a"] * 17}, None),
        ({"stop": [1]}, None),
        ({"stop": {"a": 1}}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"other": 1}}, "stream_options"),
        ({"stream_options": []}, "stream_options"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": "much"}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"echo": 1}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [4] * 512}, "prompt"),
    ],
)
def test_nonsense_is_a_400_that_names_the_field(fake: Callable[..., Any], change: dict[str, Any], param: str) -> None:
    running = fake()
    response = running.post("/v1/completions", {**GOOD, **change})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or param in (error["param"] or "")
    assert len(text_of(running)) == 3


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        (said([{"type": "text", "text": "hi"}, {"type": "image_url"}]), "messages[0].content[1]"),
        (said([{"type": "text", "text": 5}]), "messages[0].content[0]"),
        (said([{"type": "text"}]), "messages[0].content[0]"),
        (said(["hi"]), "messages[0].content[0]"),
        (said("hi", name=5), "messages[0].name"),
        (said("hi", bogus=5), "messages[0].bogus"),
        (said("hi", tool_call_id="a"), "messages[0].tool_call_id"),
        (said("hi", tool_calls=[{"id": "a", "type": "function"}]), "messages[0].tool_calls"),
        ({"messages": [5]}, "messages[0]"),
        (said("a" * 600), "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
def test_nonsense_in_a_chat(fake: Callable[..., Any], change: dict[str, Any], param: str) -> None:
    running = fake()
    good = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    response = running.post("/v1/chat/completions", {**good, **change})
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert running.post("/v1/chat/completions", good).status_code == 200


def test_half_a_character_in_a_name(fake: Callable[..., Any]) -> None:
    """JSON can spell it; UTF-8, which the answer is in, cannot."""
    running = fake()
    body = b'{"model": "fake", "prompt": "hi", "\\ud800": 1}'
    response = running.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["param"] == "\\ud800"


def test_messages_as_clients_send_them_back(fake: Callable[..., Any]) -> None:
    """With the empty fields of an answer, and with OpenAI's newer name of the system."""
    running, again = fake(), {"refusal": None, "tool_calls": [], "annotations": []}
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": "hi", "name": "a", **again}]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
    ]
    texts = [
        running.post("/v1/chat/completions", {"model": "fake", "messages": said, "max_tokens": 5, "temperature": 0})
        for said in (talk, plain)
    ]
    assert texts[0].json()["choices"] == texts[1].json()["choices"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe\xfa", 400),
        (b'{"model": "fake", "prompt": "a", "temperature": NaN}', 400),
        (b'{"model": "fake", "prompt": "a", "temperature": 1e999}', 400),
        (b'{"model": "fake", "prompt": "a", "user": Infinity}', 400),
        (b'{"model": "fake", "prompt": "\\ud800", "max_tokens": 2}', 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 200_000, 400),
        (b'{"model": "fake", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}", 400),
        (b'{"model": ["fake"], "prompt": "a"}', 404),
        (b'{"prompt": "a"}', 404),
        (b" " * (4 << 20) + b"{}", 413),
    ],
)
def test_bodies_that_are_none(fake: Callable[..., Any], content: bytes, status: int) -> None:
    running = fake()
    response = running.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error_of(response)
    assert len(text_of(running)) == 3


def test_a_body_of_unknown_length_is_bounded_too(fake: Callable[..., Any]) -> None:
    running = fake(served={"body_bytes": 1000})

    def endless() -> Any:
        for _ in range(100):
            yield b" " * 100

    headers = {"Content-Type": "application/json"}
    assert running.post("/v1/completions", content=endless(), headers=headers).status_code == 413
    assert len(text_of(running)) == 3


def test_a_body_that_does_not_come_ends(fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(B, "SECONDS", 0.2)
    running = fake()
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head(running, 100) + b'{"model":')
        client.settimeout(20)
        assert b" 408 " in client.recv(4096).split(b"\r\n")[0]
    assert len(text_of(running)) == 3


def test_only_json_is_taken(fake: Callable[..., Any]) -> None:
    running = fake()
    response = running.post("/v1/completions", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    error_of(response)


def test_an_encoded_body_is_said_to_be_one(fake: Callable[..., Any]) -> None:
    running, kind = fake(), {"Content-Type": "application/json"}
    for encoding, status in (("gzip", 415), ("identity", 200)):
        content = json.dumps(GOOD).encode()
        content = gzip.compress(content) if encoding == "gzip" else content
        response = running.post("/v1/completions", content=content, headers={**kind, "Content-Encoding": encoding})
        assert response.status_code == status and (status == 200 or "gzip" in error_of(response)["message"])


def test_whole_numbers_may_have_a_point(fake: Callable[..., Any]) -> None:
    running, kind = fake(), {"Content-Type": "application/json"}
    body = '{"model": "fake", "prompt": "hello", "top_k": 40.0, "seed": 1e0, "n": 1.0, "max_tokens": MOST}'
    for most, status in (("4.0", 200), ("4", 200), ("4.5", 400), ("1e400", 400), ("-4.0", 400)):
        response = running.post("/v1/completions", content=body.replace("MOST", most), headers=kind)
        assert response.status_code == status, most
        assert status == 400 or response.json()["usage"]["completion_tokens"] == 4


def test_hints_that_change_no_text_are_taken_and_others_named(fake: Callable[..., Any]) -> None:
    running = fake()
    hints = {"cache_prompt": True, "min_tokens": 0, "skip_special_tokens": True, "verbosity": "medium"}
    assert running.post("/v1/completions", {**GOOD, **hints}).status_code == 200
    for name, value in (("min_tokens", 3), ("skip_special_tokens", False), ("verbosity", "low")):
        response = running.post("/v1/completions", {**GOOD, name: value})
        assert response.status_code == 400 and error_of(response)["param"] == name


def test_pages_of_other_origins_ask_where_they_may(fake: Callable[..., Any]) -> None:
    page = "http://localhost:3000"
    asking = {"Origin": page, "Access-Control-Request-Method": "POST"}
    asking |= {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}

    def may(running: Any, origin: str) -> tuple[int, str | None]:
        url = f"{running.url}/v1/chat/completions"
        found = httpx.options(url, headers={**asking, "Origin": origin}, timeout=60, verify=False)
        assert "x-stainless-lang" in found.headers.get("access-control-allow-headers", "x-stainless-lang")
        return found.status_code, found.headers.get("access-control-allow-origin")

    closed, open = fake(), fake(served={"origins": (page,)})
    assert may(closed, page) == (405, None)
    assert may(open, page) == (200, page) and may(open, "http://evil.example") == (400, None)
    for path, shown in (("/v1/models", f"Bearer {open.served.token}"), ("/v1/models", "Bearer no"), ("/nothing", "")):
        answer = open.get(path, Origin=page, Authorization=shown)  # errors can be read by the page, too
        assert answer.headers["access-control-allow-origin"] == page
        other = open.get(path, Origin="http://evil.example", Authorization=shown)
        assert other.status_code == answer.status_code and "access-control-allow-origin" not in other.headers


def test_places_and_verbs_that_are_not(fake: Callable[..., Any]) -> None:
    running = fake()
    assert running.get("/v1/nothing").status_code == 404
    assert "/v1/chat/completions" in error_of(running.post("/chat/completions", GOOD))["message"]
    assert running.get("/v1/models/").json() == running.get("/v1/models").json()
    assert running.get("/v1/models/fake/").json()["id"] == "fake"
    wrong = running.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    error_of(running.get("/nothing"))
    assert running.get("/../../etc/passwd").status_code == 404


def test_the_token_guards_all_but_page_and_health(fake: Callable[..., Any]) -> None:
    running = fake()
    for path in ("/v1/models", "/metrics"):
        for shown in ("", "Bearer", "Bearer wrong", "Basic a-token-for-tests", "Bearer a-token-for-test\xe9"):
            response = running.get(path, Authorization=shown.encode("latin-1"))
            assert response.status_code == 401, (path, shown)
            assert error_of(response)["code"] == "invalid_api_key"
        assert running.get(path).status_code == 200
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        assert running.post(path, GOOD, headers={"Authorization": "Bearer no"}).status_code == 401
    assert running.get("/health", Authorization="").json() == {"status": "ok"}
    page = running.get("/", Authorization="")
    assert page.status_code == 200 and "a-token-for-tests" not in page.text


def test_a_name_of_the_internet_is_refused(fake: Callable[..., Any]) -> None:
    running = fake(served={"token": None, "hosts": frozenset({"127.0.0.1", "localhost", "::1"})})
    assert running.get("/v1/models").status_code == 200
    assert running.get("/v1/models", Host="[::1]:8000").status_code == 200
    assert running.get("/v1/models", Host="evil.example:8000").status_code == 403


def test_the_page_needs_nothing_from_elsewhere(fake: Callable[..., Any]) -> None:
    page = fake().get("/")
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(", page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy


def test_metrics(fake: Callable[..., Any]) -> None:
    running = fake()
    text_of(running), text_of(running)
    running.post("/v1/completions", {})
    found = running.get("/metrics").text
    for line in (
        'fewbit_requests_total{path="/v1/completions",status="200"} 2.0',
        'fewbit_requests_total{path="/v1/completions",status="404"} 1.0',
        "fewbit_running 0.0",
        "fewbit_generated_tokens_total 6.0",
        "fewbit_prompt_tokens_total 10.0",
        "fewbit_first_token_seconds_count 2.0",
        "fewbit_request_seconds_count 2.0",
    ):
        assert line in found, line


def head(running: Any, length: int) -> bytes:
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Authorization: Bearer a-token-for-tests",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def until_quiet(running: Any) -> None:
    deadline = time.monotonic() + 20
    while (stats := running.served.batcher.stats()).running + stats.waiting:
        assert time.monotonic() < deadline, "a text outlives its client"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_cancelled(fake: Callable[..., Any], stream: bool) -> None:
    running = fake(Limits(running=2), seconds=0.01)
    body = json.dumps({"model": "fake", "prompt": "hello", "max_tokens": 500, "stream": stream, "n": 4}).encode()
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head(running, len(body)) + body)
        deadline = time.monotonic() + 20
        while running.served.batcher.stats().generated_tokens < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    until_quiet(running)
    assert running.served.batcher.stats().generated_tokens < 4 * 500
    assert len(text_of(running)) == 3


def test_a_slow_reader_delays_nobody(fake: Callable[..., Any]) -> None:
    running = fake()
    body = json.dumps({"model": "fake", "prompt": "slow", "max_tokens": 500, "stream": True, "temperature": 0}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", running.port))
        client.sendall(head(running, len(body)) + body)
        until = time.monotonic() + 20
        while running.served.batcher.stats().generated_tokens < 500 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(text_of(running)) == 3  # while nothing of the other answer has been read
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            found += client.recv(1000)
    words = running.served.words
    said = [json.loads(line[6:]) for line in found.decode().split("\n") if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in said)
    assert text == words.decode(running.served.batcher.engine.after(words.encode("slow"), 500))


def test_a_template_that_loops_is_an_error_of_its_own_request(
    fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = fake()
    words = running.served.words
    loops = "{% set m = messages[0].content %}{% if m == 'loop' %}{{ (3 + m | length) ** (10 ** 9) }}{% endif %}{{ m }}"
    monkeypatch.setattr(words.tokenizer, "chat_template", loops)
    monkeypatch.setattr(words, "_templates", Templates(seconds=0.2))

    def ask(content: str) -> Any:
        messages = [{"role": "user", "content": content}]
        return running.post("/v1/chat/completions", {"model": "fake", "messages": messages, "max_tokens": 2})

    assert ask("hello").status_code == 200
    refused = ask("loop")
    assert refused.status_code == 400
    assert "processor time" in error_of(refused)["message"]
    assert ask("hello").status_code == 200 and text_of(running)
    words.close()
