# SPDX-License-Identifier: Apache-2.0
"""Who sends no request, or a part of one, is sent away; who takes time for the rest is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import Any

import pytest
import uvicorn

from fewbit.serve.heads import TimedHeads

SECONDS = 0.4
LONG = 2.0
HEAD = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n"


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while len(body) < 2:
        body += (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": body})


async def _sent(*parts: tuple[bytes, float]) -> tuple[bytes, float]:
    """What the server says to ``parts``, each followed by a pause, and after how long it closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(_answer, log_level="error", lifespan="off", ws="none", http=TimedHeads)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
        began = time.monotonic()
        for part, pause in parts:
            writer.write(part)
            await asyncio.sleep(pause)
        found = b""
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):  # two classes before Python 3.11
            while part := await asyncio.wait_for(reader.read(1 << 12), LONG):
                found += part
        took = time.monotonic() - began
        writer.close()
        server.should_exit = True
        await serving
        return found, took


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedHeads, "seconds", SECONDS)


@pytest.mark.parametrize("parts", [[], [(HEAD[:9], 0.2), (HEAD[9:12], 0.2), (HEAD[12:15], 0.0)]])
def test_a_head_that_does_not_come(parts: list[tuple[bytes, float]]) -> None:
    found, took = asyncio.run(_sent(*parts))
    assert found == b"" and took < LONG


def test_neither_does_that_of_the_second_request() -> None:
    found, took = asyncio.run(_sent((HEAD + b"ab", 0.2), (HEAD[:9], 0.0)))
    assert found.endswith(b"ab") and took < LONG


def test_a_body_and_the_next_request_have_time() -> None:
    found, _ = asyncio.run(_sent((HEAD, 2 * SECONDS), (b"ab", 2 * SECONDS), (HEAD + b"cd", 0.0)))
    assert found.count(b"HTTP/1.1 200") == 2 and found.endswith(b"cd")
