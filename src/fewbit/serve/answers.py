# SPDX-License-Identifier: Apache-2.0
"""From the pieces of texts to answers: whole, or streamed as server-sent events. Who leaves cancels their texts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fewbit.decode.batch import Batcher
from fewbit.decode.job import Job, Piece
from fewbit.serve.ask import Ask
from fewbit.serve.errors import api_error
from fewbit.serve.metrics import Metrics
from fewbit.serve.shapes import Shape, joined


class Texts:
    """The texts of one request, from the first to the last piece of all.

    Raises:
        ApiError and those of :meth:`Batcher.submit`; none of the texts is then begun.
    """

    def __init__(self, batcher: Batcher, ask: Ask, metrics: Metrics) -> None:
        self._batcher, self._ask, self._metrics = batcher, ask, metrics
        self._began = time.perf_counter()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.jobs: list[Job] = []
        try:
            for prompt in ask.prompts:
                for branch in range(ask.n):
                    self._begin(prompt, branch)
        except Exception:
            self.cancel()
            raise

    def _begin(self, prompt: tuple[int, ...], branch: int) -> None:
        index = len(self.jobs)

        def deliver(piece: Piece) -> None:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        scored = bool(self._ask.echo) and self._ask.sampling.logprobs is not None
        self.jobs.append(self._batcher.submit(prompt, self._ask.sampling, deliver, branch, scored))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) as they come. Raises the error of a text."""
        open, first = len(self.jobs), True
        while open:
            index, piece = await self._pieces.get()
            if first and piece.error is None:
                self._metrics.first.observe(time.perf_counter() - self._began)
                first = False
            if piece.error is not None:
                raise piece.error
            open -= piece.last
            yield index, piece
        self._metrics.whole.observe(time.perf_counter() - self._began)

    async def echo(self, index: int, shape: Shape) -> tuple[str, dict[str, Any] | None]:
        """What choice ``index``, of which a piece has come, begins with: text, and what is known of its tokens."""
        if not self._ask.echo:
            return "", None
        job, text = self.jobs[index], self._ask.echo[index // self._ask.n]
        if not job.scored:
            return text, None
        return text, await run_in_threadpool(shape.echo, job.prompt, job.scores, text)  # seconds for a long one

    def cancel(self) -> None:
        for job in self.jobs:
            self._batcher.cancel(job)

    def usage(self) -> dict[str, Any]:
        prompts = sum(map(len, self._ask.prompts))
        written = sum(job.generated for job in self.jobs)
        reused = sum(job.reused for job in self.jobs[:: self._ask.n])
        return {
            "prompt_tokens": prompts,
            "completion_tokens": written,
            "total_tokens": prompts + written,
            "prompt_tokens_details": {"cached_tokens": reused},
        }


async def whole(texts: Texts, shape: Shape) -> JSONResponse:
    """All texts in one object."""
    parts: list[list[Piece]] = [[] for _ in texts.jobs]
    async for index, piece in texts.pieces():
        parts[index].append(piece)
    choices = []
    for index, pieces in enumerate(parts):
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        text, logs = await texts.echo(index, shape)
        logs = joined(logs, shape.logprobs(tokens, len(text)))
        text += "".join(piece.text for piece in pieces)
        choices.append(shape.choice(index, text, pieces[-1].finish, logs))
    return JSONResponse(shape.whole(choices, texts.usage()))


async def events(texts: Texts, shape: Shape, include_usage: bool) -> AsyncIterator[str]:
    """All texts as server-sent events, in the order in which they are written."""
    none = {"usage": None} if include_usage else {}
    offsets: list[int | None] = [None] * len(texts.jobs)
    try:
        if shape.chat:
            for index in range(len(texts.jobs)):
                yield _event(shape.chunk([shape.opening(index)], **none))
        async for index, piece in texts.pieces():
            text, logs = await texts.echo(index, shape) if offsets[index] is None else ("", None)
            offset = len(text) + (offsets[index] or 0)
            text, logs = text + piece.text, joined(logs, shape.logprobs(piece.tokens, offset))
            offsets[index] = offset + shape.length(piece.tokens)
            if text or piece.finish or logs:
                yield _event(shape.chunk([shape.delta(index, text, piece.finish, logs)], **none))
        if include_usage:
            yield _event(shape.chunk([], usage=texts.usage()))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status is sent already; clients know this event
        yield _event(api_error(error).body())


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Stream(StreamingResponse):
    """Events until the last one, or until the client leaves."""

    def __init__(self, texts: Texts, shape: Shape, include_usage: bool) -> None:
        self._texts = texts
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(texts, shape, include_usage), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._texts.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What ``work`` answers; it is cancelled when the client leaves first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        watching.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
