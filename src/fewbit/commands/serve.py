# SPDX-License-Identifier: Apache-2.0
"""``fewbit serve``: a model behind the OpenAI protocol, until Ctrl-C."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import secrets
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.commands import anew, images
from fewbit.commands.generate import limit_threads, quieten
from fewbit.commands.guard import guarded
from fewbit.commands.saying import note
from fewbit.errors import InputError, SpecError, UnsupportedError

if TYPE_CHECKING:
    from fewbit.decode.batch import Batcher
    from fewbit.decode.text import Words
    from fewbit.serve.app import Served

NEEDED = ("starlette", "uvicorn", "prometheus_client")
INSTALL = 'pip install "fewbit[serve]"'
GRACE = 3
"""Seconds that running answers have after Ctrl-C; then each ends with an error."""
CUT = 2
"""Seconds after which connections that take no such error are cut."""
CONNECTIONS = 1000
"""At once; what comes beyond is told to come back."""
IDLE = 75
"""Seconds after which a connection without request is closed."""


@dataclass(frozen=True)
class Request:
    """The options of the command; ``fewbit serve --help`` says what each is."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    no_token: bool = False
    name: str | None = None
    sequences: int = 8
    kept: int = 4
    queue: int = 256
    context: int | None = None
    max_tokens: int | None = None
    kv: str = "float16"
    activation: str | None = None
    embeddings: bool = False
    threads: int | None = None
    image: bool = True
    origins: list[str] = field(default_factory=list)


def start(request: Request, debug: bool) -> None:
    """:func:`run`, without what read the command line where that can be."""
    anew.begin("serve", {"debug": debug, **dataclasses.asdict(request), "folder": os.fspath(request.folder)})
    run(request)


def begun(folder: str, debug: bool, **options: Any) -> None:
    """:func:`run` as a command, of what :func:`start` was asked."""

    @guarded
    def command(debug: bool) -> None:
        run(Request(Path(folder), **options))

    try:
        command(debug=debug)
    except BrokenPipeError:  # nobody reads the address
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor what is flushed at the end
        sys.exit(1)


def run(request: Request) -> None:
    """Load, listen, print the address once on stdout, and serve.

    Raises:
        UnsupportedError: the extra is not installed. InputError: the model cannot be used, or the port is taken.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError("fewbit serve", f"{', '.join(missing)} is not installed", INSTALL)
    from fewbit.serve.lean import without_command_line

    without_command_line()
    from uvicorn.config import Config

    from fewbit.serve.app import application
    from fewbit.serve.ending import EndingServer
    from fewbit.serve.heads import TimedHeads

    token = _token(request)
    _check_origins(request)
    with _listen(request.host, request.port) as listener:  # before loading: a taken port is said at once
        quieten()
        limit_threads(request.threads)
        served = serve(request, token)
        config = Config(
            application(served),
            http=TimedHeads,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=IDLE,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=GRACE + CUT,
        )
        server = EndingServer(config, GRACE, None if served.batcher is None else served.batcher.close)
        _announce(served, request.host, listener.getsockname()[1])
        try:
            # SIGTERM is one as well (see guard). uvicorn hands it on when all is closed, if it still can.
            with suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
            note("stopped")
        finally:
            served.words.close()
            if served.batcher is not None:
                served.batcher.close()


def serve(request: Request, token: str | None) -> Served:
    """The model of ``request``, ready to be asked. Raises as :func:`fewbit.decode.open_engine`."""
    from fewbit.decode.text import words_of
    from fewbit.serve import embeddings
    from fewbit.serve.app import Served

    if not (request.folder / "config.json").is_file():
        raise InputError(
            f"serving {request.folder}", "it holds no config.json", "a folder of fewbit or of transformers"
        )
    words = words_of(request.folder)
    encoder = embeddings.is_encoder(request.folder)
    local = _local(request.host)
    return Served(
        name=request.name or request.folder.resolve().name,
        words=words,
        batcher=None if encoder else _batcher(request, words),
        embedder=embeddings.embedder(request.folder, words) if encoder or request.embeddings else None,
        token=token,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", request.host}) if local else None,
        max_tokens=request.max_tokens,
        origins=tuple(request.origins),
    )


def _batcher(request: Request, words: Words) -> Batcher:
    from fewbit.decode.batch import Batcher, Limits
    from fewbit.decode.engine import open_engine

    engine = open_engine(
        request.folder,
        activation=request.activation,
        kv=request.kv,
        sequences=request.sequences + request.kept,
        context=request.context,
        threads=request.threads,
    )
    if engine.why is not None:
        note(f"note: {engine.name} runs this model, more slowly: {engine.why}")
    if request.image:
        images.keep(engine, request.folder, request.activation)
    return Batcher(engine, words, Limits(request.sequences, request.queue, request.kept))


def _token(request: Request) -> str | None:
    """What clients must show: the one given, none, or a new one."""
    if request.no_token:
        if request.token is not None:
            raise SpecError("--no-token", "--token is given as well", "one of the two")
        return None
    token = secrets.token_urlsafe(24) if request.token is None else request.token
    if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise SpecError("--token", "it is too easily guessed, or no header can hold it", "8 or more letters and digits")
    return token


def _check_origins(request: Request) -> None:
    for origin in request.origins:
        if origin == "*" and request.no_token:
            raise SpecError(
                "--allow-origin '*'", "with --no-token any page could use the model", "a token, or an origin"
            )
        if origin != "*" and not re.fullmatch(r"https?://[^/?#\s@]+", origin):
            raise SpecError(f"--allow-origin {origin}", "it is no origin", "a scheme and a host: http://localhost:3000")


def _local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"listening on {host} port {port}", why, "another --port would work, or --port 0") from None


def _announce(served: Served, host: str, port: int) -> None:
    if not _local(host):
        who = (
            "everyone who reaches this address can use the model"
            if served.token is None
            else "the token is sent in clear"
        )
        note(f"warning: other machines can reach this server, over plain HTTP: {who}")
    place = f"[{host}]" if ":" in host else host
    key = "" if served.token is None else f"#token={served.token}"
    print(f"{served.name} at http://{place}:{port}/{key}", flush=True)
    if served.token is not None:
        note(f"for clients: base_url http://{place}:{port}/v1, api_key {served.token}")
