# SPDX-License-Identifier: Apache-2.0
"""A server that stops tells of it when grace is over, and not where it is through before."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn

from fewbit.serve.ending import EndingServer


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """Ends when :data:`ENDED` says so."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await asyncio.to_thread(ENDED.wait, 20)
    await send({"type": "http.response.body", "body": b"end"})


ENDED = threading.Event()


async def _stop(asked: bool) -> bytes:
    ENDED.clear()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(_answer, log_level="error", lifespan="off", ws="none")
        server = EndingServer(config, 0.0 if asked else 5.0, ENDED.set)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        port = listener.getsockname()[1]
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if asked:
            writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
        server.should_exit = True
        found = await reader.read()
        writer.close()
        await serving
        return found


def test_what_is_being_written_when_it_stops_is_ended_after_the_grace() -> None:
    assert b"end" in asyncio.run(asyncio.wait_for(_stop(True), 15)) and ENDED.is_set()


def test_a_server_that_has_nothing_to_write_ends_at_once() -> None:
    assert asyncio.run(asyncio.wait_for(_stop(False), 4)) == b"" and not ENDED.is_set()
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
