# SPDX-License-Identifier: Apache-2.0
"""Many clients of one server, most of them badly behaved, and every text that arrives compared with what it must be."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

WAYS = {"read": 8, "whole": 4, "slow": 3, "leave": 4, "early": 2, "half": 1, "wrong": 1}
"""How a client behaves, and how often: reads a stream; asks for it whole; reads with pauses; leaves in the middle of a
stream; leaves at once; leaves in the middle of its own body; sends nonsense."""
PAUSE = 0.05
PATIENCE = 120.0
"""Seconds without any news after which an answer counts as lost."""


@dataclass(frozen=True)
class Case:
    """A request, and the one text that answers it, whatever else the server does."""

    body: dict[str, Any]
    text: str = ""


@dataclass
class Tally:
    """What happened: how often each way was gone, seconds to first pieces, what was wrong, and how many texts were read
    far enough to compare and how many of these came out otherwise."""

    ways: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    busy: int = 0
    read: int = 0
    other: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Server:
    port: int
    token: str
    path: str = "/v1/completions"

    async def send(self, body: bytes, share: float = 1.0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request on a connection of its own; of its body the first ``share``."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body[: round(len(body) * share)])
        await writer.drain()
        return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of an answer; its headers are read past."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
    return int(head.split(b" ", 2)[1])


async def pieces(reader: asyncio.StreamReader, pause: float = 0.0) -> AsyncIterator[str]:
    """The texts of a streamed completion. Raises RuntimeError where it ends with an error, or not at all."""
    while line := await asyncio.wait_for(reader.readline(), PATIENCE):
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            yield event["choices"][0]["text"]
            await asyncio.sleep(pause)
    raise RuntimeError("the stream ended too early")


async def answer(server: Server, body: dict[str, Any]) -> str:
    """The text of a request that is made alone."""
    reader, writer = await server.send(json.dumps(body).encode())
    try:
        status = await status_of(reader)
        text = await asyncio.wait_for(reader.read(), PATIENCE)
        if status != 200:
            raise RuntimeError(f"status {status}: {text[:200]!r}")
        return str(json.loads(text)["choices"][0]["text"])
    finally:
        writer.transport.abort()


async def visit(server: Server, case: Case, way: str, chance: random.Random, tally: Tally) -> None:
    """One request in one way."""
    streamed = way in ("read", "slow", "leave")
    body = {**case.body, "stream": streamed, **({"temperature": -1} if way == "wrong" else {})}
    began = time.perf_counter()
    reader, writer = await server.send(json.dumps(body).encode(), 0.5 if way == "half" else 1.0)
    try:
        if way in ("early", "half"):
            await asyncio.sleep(chance.random() * 0.05)
            return
        status = await status_of(reader)
        if status == 429:  # a full queue is an answer; try again later
            tally.busy += 1
            await asyncio.sleep(chance.random())
        elif status != (400 if way == "wrong" else 200):
            tally.wrong.append(f"{way}: status {status}")
        elif way == "whole":
            found = json.loads(await asyncio.wait_for(reader.read(), PATIENCE))["choices"][0]["text"]
            compare(tally, way, found, case.text)
        elif streamed:
            await follow(reader, case, way, chance, tally, began)
    finally:
        writer.transport.abort()


async def follow(
    reader: asyncio.StreamReader, case: Case, way: str, chance: random.Random, tally: Tally, began: float
) -> None:
    leaves = chance.randrange(1, 12) if way == "leave" else None
    found, count = "", 0
    async for piece in pieces(reader, PAUSE if way == "slow" else 0.0):
        if not count:
            tally.first.append(time.perf_counter() - began)
        found, count = found + piece, count + 1
        if count == leaves:
            break
    compare(tally, way, found, case.text[: len(found)] if leaves else case.text)


def compare(tally: Tally, way: str, found: str, expected: str) -> None:
    tally.read += 1
    if found != expected:
        tally.other += 1
        tally.wrong.append(f"{way}: {found!r} is not {expected!r}")


async def storm(server: Server, cases: list[Case], clients: int, seconds: float) -> Tally:
    """``clients`` at once, each with one request after the other, for about ``seconds``."""
    tally, until = Tally(), time.monotonic() + seconds

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            way = chance.choices(list(WAYS), list(WAYS.values()))[0]
            tally.ways[way] += 1
            try:
                await visit(server, chance.choice(cases), way, chance, tally)
            except Exception as error:
                tally.wrong.append(f"{way}: {type(error).__name__}: {error}")

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tally
