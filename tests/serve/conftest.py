# SPDX-License-Identifier: Apache-2.0
"""A server on a free port of loopback, in a thread, and the helpers here and of tests/decode."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "decode")]

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from fewbit.decode.batch import Batcher, Limits
from fewbit.decode.text import Words, words_of
from fewbit.serve.app import Served, application

TOKEN = "a-token-for-tests"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[[Path], int]) -> Words:
    folder = tmp_path_factory.mktemp("words")
    byte_tokenizer(folder)
    words = words_of(folder)
    words.tokenizer.chat_template = TEMPLATE
    return words


@dataclass
class Running:
    """A server: where, what it serves, and how a client without library asks (which reads no certificates: that takes
    longer than an answer)."""

    url: str
    port: int
    served: Served

    def openai(self, **options: Any) -> Any:
        openai = pytest.importorskip("openai")
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": TOKEN, "max_retries": 0, "timeout": 60, **options}
        )

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        httpx = pytest.importorskip("httpx")
        headers = {"Authorization": f"Bearer {TOKEN}", **options.pop("headers", {})}
        given = {"json": body} if body is not None else {}
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=60, verify=False, **given, **options)

    def get(self, path: str, **headers: str) -> Any:
        httpx = pytest.importorskip("httpx")
        headers = {"Authorization": f"Bearer {TOKEN}", **headers}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60, verify=False)


@pytest.fixture
def serve() -> Iterator[Callable[[Served], Running]]:
    import uvicorn

    running: list[tuple[Any, threading.Thread, Served]] = []

    def start(served: Served) -> Running:
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        port = listener.getsockname()[1]
        config = uvicorn.Config(application(served), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread, served))
        return Running(f"http://127.0.0.1:{port}", port, served)

    yield start
    for server, thread, served in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"
        if served.batcher is not None:
            served.batcher.close()


@pytest.fixture
def fake(serve: Callable[[Served], Running], words: Words) -> Callable[..., Running]:
    """``fake(limits, **engine)``: a server of the fake engine, called "fake"."""
    from fake_engine import FakeEngine

    def start(limits: Limits | None = None, *, served: dict[str, Any] | None = None, **engine: Any) -> Running:
        engine = {"never": (0, 1, *range(96, 258)), "context": 512, **engine}  # letters of ASCII
        batcher = Batcher(FakeEngine(**engine), words, limits or Limits())
        return serve(Served(**{"name": "fake", "words": words, "batcher": batcher, "token": TOKEN, **(served or {})}))

    return start
