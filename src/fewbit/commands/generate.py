# SPDX-License-Identifier: Apache-2.0
"""``fewbit generate``: continue a text, or answer a message, printed as it comes."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.commands import images
from fewbit.commands.saying import note
from fewbit.kernels import native

if TYPE_CHECKING:
    from fewbit.decode.sampling import Sampling
    from fewbit.decode.writer import Writer


@dataclass(frozen=True)
class Request:
    """The options of the command; ``fewbit generate --help`` says what each is. ``sampling``: arguments of
    :class:`fewbit.decode.sampling.Sampling`."""

    folder: Path
    prompt: str
    chat: bool = False
    sampling: dict[str, object] = field(default_factory=dict)
    activation: str | None = None
    kv: str = "float16"
    threads: int | None = None
    image: bool = True


def run(request: Request) -> None:
    """Stream the continuation to stdout; tokens a second to stderr."""
    from fewbit.decode.sampling import Sampling
    from fewbit.decode.writer import Writer

    quieten()
    limit_threads(request.threads)
    sampling = Sampling(**request.sampling)  # type: ignore[arg-type]
    with Writer(request.folder, activation=request.activation, kv=request.kv, threads=request.threads) as writer:
        if writer.engine.why is not None:
            note(f"transformers computes, more slowly: {writer.engine.why}")
        began = time.perf_counter()
        added = stream(writer, request.prompt, sampling, request.chat)
        seconds = time.perf_counter() - began
        if request.image:
            images.keep(writer.engine, request.folder, request.activation)
    note(f"{added} tokens in {seconds:.1f} s, {added / max(seconds, 1e-9):.1f} tokens/s")


def stream(writer: Writer, prompt: str, sampling: Sampling, chat: bool = False) -> int:
    """Print ``prompt`` and its continuation, or the answer to it, to stdout; returns the number of tokens added.

    Raises:
        InputError: the prompt holds no token, or more than the context; there is no template to ``chat`` by.
    """
    pieces = writer.pieces([{"role": "user", "content": prompt}] if chat else prompt, sampling)
    if not chat:
        print(prompt, end="", flush=True)
    added = 0
    for piece in pieces:
        print(piece.text, end="", flush=True)
        added += len(piece.tokens)
    print(flush=True)
    return added


def prepare(threads: int | None) -> None:
    """``threads`` for torch and for fewbit's kernels (None leaves both as they are); no bars from transformers."""
    quieten()
    limit_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def quieten() -> None:
    """No bars from transformers."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):  # read when transformers is imported, if it ever is
        os.environ.setdefault(name, "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()


def limit_threads(threads: int | None) -> None:
    """``threads`` for fewbit's kernels, without torch; None leaves them as they are."""
    if threads is not None:
        native.set_threads(threads)
