# SPDX-License-Identifier: Apache-2.0
"""The application: who may ask, what is where, and that an error is an answer."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fewbit.decode.batch import Batcher, Stats
from fewbit.decode.engine import Engine
from fewbit.decode.text import Words
from fewbit.serve import ask as A
from fewbit.serve import embeddings as E
from fewbit.serve.answers import Stream, Texts, unless_gone, whole
from fewbit.serve.body import read_object
from fewbit.serve.errors import ApiError, api_error
from fewbit.serve.metrics import Metrics
from fewbit.serve.shapes import Shape

LOG = logging.getLogger("fewbit.serve")
PLACES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models")
TOO_LONG = "context_length_exceeded"
Handler = Callable[[Request], Awaitable[Response]]
Parse = Callable[[dict[str, Any], Words], A.Ask]


@dataclass(frozen=True)
class Served:
    """What is served.

    * ``name``: the model's, as clients ask for it. ``batcher``: None for an encoder. ``embedder``: None where vectors
      were not asked for.
    * ``token``: what clients must show; None lets everyone in who reaches the port.
    * ``hosts``: names by which clients may call this machine, so that no page of the internet can under one of its
      own; None allows all.
    * ``body_bytes``, ``max_tokens``: most of a request and of a text.
    * ``origins``: whose pages may ask, by CORS, such as "http://localhost:3000"; "*" is any.
    """

    name: str
    words: Words
    batcher: Batcher | None = None
    embedder: E.Embedder | None = None
    token: str | None = None
    hosts: frozenset[str] | None = None
    body_bytes: int = 4 << 20
    max_tokens: int | None = None
    origins: tuple[str, ...] = ()


def application(served: Served) -> Starlette:
    """The ASGI application of ``served``."""
    batcher = served.batcher
    metrics = Metrics(batcher.stats if batcher is not None else Stats)
    began = int(time.time())
    page = _Page()

    async def index(request: Request) -> Response:
        return HTMLResponse(page.html, headers=page.headers)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics_text(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(request: Request) -> Response:
        asked = request.path_params.get("model", "").rstrip("/")
        if asked:
            _check_model(served, asked)
        one = {"id": served.name, "object": "model", "created": began, "owned_by": "fewbit"}
        return JSONResponse(one if asked else {"object": "list", "data": [one]})

    def generation(parse: Parse) -> Handler:
        async def answer(request: Request) -> Response:
            return await _generate(served, metrics, request, parse)

        return answer

    async def embeddings(request: Request) -> Response:
        body = await read_object(request, served.body_bytes)
        _check_model(served, body.get("model"))
        if served.embedder is None:
            message = "this server was started without --embeddings"
            raise ApiError(501, message, code="embeddings_not_loaded")
        return JSONResponse(await run_in_threadpool(E.answer, served.embedder, body, served.name))

    def route(path: str, handler: Handler, method: str, *, public: bool = False) -> Route:
        return Route(path, _guarded(served, metrics, path, handler, public), methods=[method])

    return Starlette(
        routes=[
            route("/", index, "GET", public=True),
            route("/health", health, "GET", public=True),
            route("/metrics", metrics_text, "GET"),
            route("/v1/models", models, "GET"),
            route("/v1/models/{model:path}", models, "GET"),
            route("/v1/completions", generation(A.completion), "POST"),
            route("/v1/chat/completions", generation(A.chat), "POST"),
            route("/v1/embeddings", embeddings, "POST"),
        ],
        exception_handlers={HTTPException: _no_such_place},
        middleware=_pages_of(served.origins),
    )


def _pages_of(origins: tuple[str, ...]) -> list[Middleware]:
    """What tells browsers that pages of ``origins`` may ask."""
    if not origins:
        return []
    from starlette.middleware.cors import CORSMiddleware

    # every header: OpenAI's client of JavaScript sends some of its own; what guards is the token
    return [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])]


async def _generate(served: Served, metrics: Metrics, request: Request, parse: Parse) -> Response:
    body = await read_object(request, served.body_bytes)
    _check_model(served, body.get("model"))
    if served.batcher is None:
        raise ApiError(501, f"{served.name} reads texts and writes none; /v1/embeddings would work", code="encoder")
    ask = await run_in_threadpool(parse, body, served.words)
    ask = _bounded(ask, served.max_tokens, served.batcher.engine)
    texts = Texts(served.batcher, ask, metrics)
    shape = Shape(ask.chat, served.name, served.words)
    if ask.stream:
        return Stream(texts, shape, ask.include_usage)
    try:
        return await unless_gone(request, whole(texts, shape))
    finally:
        texts.cancel()


def _bounded(ask: A.Ask, most: int | None, engine: Engine) -> A.Ask:
    """``ask`` with a number of tokens: the one asked for, else the usual one where the context has room for it."""
    for prompt in ask.prompts:
        _check_prompt(prompt, engine, "messages" if ask.chat else "prompt")
    longest = max(map(len, ask.prompts))
    asked, room = ask.sampling.max_tokens, engine.context - longest
    if asked is not None:
        if most is not None and asked > most:
            raise ApiError(400, f"{ask.limit} {asked}; a text has at most {most} tokens here", ask.limit)
        if asked > room:
            found = f"the context has {engine.context} tokens, the prompt takes {longest}"
            raise ApiError(400, f"{ask.limit} {asked}; {found}; at most {room}", ask.limit, TOO_LONG)
        return ask
    usual = room if ask.chat else A.COMPLETION_TOKENS
    tokens = min(room, usual, most or usual)
    return dataclasses.replace(ask, sampling=dataclasses.replace(ask.sampling, max_tokens=tokens))


def _check_prompt(prompt: tuple[int, ...], engine: Engine, name: str) -> None:
    if len(prompt) >= engine.context:
        message = f"the prompt has {len(prompt)} tokens, the context {engine.context}; a shorter prompt would work"
        raise ApiError(400, message, name, TOO_LONG)
    if not all(0 <= token < engine.vocab_size for token in prompt):
        raise ApiError(400, f"the prompt has a token that is not from 0 to {engine.vocab_size - 1}", name)


def _check_model(served: Served, name: Any) -> None:
    if name != served.name:
        asked = "no model is named" if name is None else f"there is no model {str(name)[:200]!r}"
        raise ApiError(404, f"{asked}; this server has {served.name!r}", "model", "model_not_found")


def _guarded(served: Served, metrics: Metrics, path: str, handler: Handler, public: bool) -> Handler:
    """``handler`` for those who may ask; what it raises becomes an answer, and every answer is counted."""

    async def answer(request: Request) -> Response:
        try:
            _check_host(served, request)
            if not public:
                _check_token(served, request)
            response = await handler(request)
        except Exception as error:
            found = api_error(error)
            if found.code == "internal_error":
                LOG.error("%s failed", path, exc_info=error)
            response = found.response()
        metrics.requests.labels(path, response.status_code).inc()
        return response

    return answer


def _check_host(served: Served, request: Request) -> None:
    host = request.url.hostname
    if served.hosts is not None and host not in served.hosts:
        raise ApiError(403, f"this server is not called {str(host)[:200]!r}; {min(served.hosts)} would work")


def _check_token(served: Served, request: Request) -> None:
    if served.token is None:
        return
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), served.token.encode()):
        message = "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`"
        raise ApiError(401, message, code="invalid_api_key")


async def _no_such_place(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    works = f"; what there is: {', '.join(PLACES)}" if error.status_code == 404 else ""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}{works}"
    answer = ApiError(error.status_code, message).response()
    answer.headers.update(error.headers or {})  # which methods a place allows
    return answer


class _Page:
    """The chat page, which may run its own script and talk to this server, and nothing else."""

    def __init__(self) -> None:
        self.html = (files("fewbit.serve") / "page.html").read_text(encoding="utf-8")
        allowed = {kind: " ".join(_hashes(self.html, kind)) for kind in ("script", "style")}
        policy = (
            f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.headers = {
            "Content-Security-Policy": policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }


def _hashes(html: str, kind: str) -> list[str]:
    """What a policy calls the inline scripts or styles of a page."""
    texts = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]
