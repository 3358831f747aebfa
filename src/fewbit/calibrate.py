# SPDX-License-Identifier: Apache-2.0
"""Calibration text: bundled, or the user's; tokenised into equal windows. No network, no global random state."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.core import given
from fewbit.errors import InputError

BUNDLED = "bundled English prose (public domain)"


@dataclass(frozen=True)
class Text:
    """What to draw of a text: ``samples`` windows of ``context`` tokens. ``source``: the file, None for the bundle."""

    samples: int = 0
    context: int = 1
    source: str | Path | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows ``ids`` (samples, context) int64, with where they came from and the hash of the ids themselves."""

    source: str
    ids: Tensor

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def describe(self) -> dict[str, Any]:
        samples, context = self.ids.shape
        return {
            "source": self.source,
            "sha256": self.sha256,
            "samples": samples,
            "context": context,
            "tokens": self.tokens,
        }


@cache
def _bundled(name: str) -> str:
    return lzma.decompress(resources.files("fewbit").joinpath("data").joinpath(name).read_bytes()).decode("utf-8")


def calibration_text() -> str:
    """1.2 MB of public-domain English prose; shares no author with :func:`heldout_text`."""
    return _bundled("calibration.txt.xz")


def heldout_text() -> str:
    """0.2 MB of public-domain English prose for evaluation only."""
    return _bundled("heldout.txt.xz")


def read_text(path: str | Path) -> str:
    """The text of a ``.txt`` file, or of a JSON-lines file with a ``text`` field in every line.

    Raises:
        InputError: the file is missing, empty, not UTF-8, or a line is not an object with a string ``text``.
    """
    path = given.place("text file", path)
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"text file {path}", "it does not exist", "give a .txt or .jsonl file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path}", f"it is not UTF-8 ({error})", "save it as UTF-8") from None
    except OSError as error:
        raise InputError(
            f"text file {path}", f"it cannot be read ({error.strerror})", "give a .txt or .jsonl file"
        ) from None
    if path.suffix in (".jsonl", ".json"):
        content = "\n\n".join(
            _field(line, number, path) for number, line in enumerate(content.splitlines(), 1) if line.strip()
        )
    if not content.strip():
        raise InputError(f"text file {path}", "it holds no text", "give a file with text")
    return content


def _field(line: str, number: int, path: Path) -> str:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise InputError(f"{path} line {number}", "it is not JSON", 'every line is like {"text": "..."}') from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError(f"{path} line {number}", "it has no string field `text`", 'every line is like {"text": "..."}')
    return str(value["text"])


def windows(tokenizer: Callable[..., Any], text: str, context: int, what: str) -> Tensor:
    """All whole windows of ``context`` tokens, (windows, context); each starts with BOS where the tokenizer adds one.

    Raises:
        InputError: the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [token for token in tokenizer("a")["input_ids"][:1] if token == getattr(tokenizer, "bos_token_id", None)]
    body = context - len(start)
    number = len(ids) // body
    if number == 0:
        longest = len(ids) + len(start)
        works = f"give at least {body}" + (f", or a context of at most {longest} tokens" if longest > 1 else "")
        raise InputError(what, f"it has {len(ids)} token{'s' if len(ids) != 1 else ''}", works)
    chunks = torch.tensor(ids[: number * body], dtype=torch.int64).reshape(number, body)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(number, -1), chunks], 1) if start else chunks


def passages(text: str, length: int) -> list[str]:
    """``text`` cut at spaces into passages of about ``length`` characters."""
    cuts = [0]
    while cuts[-1] < len(text):
        place = text.find(" ", cuts[-1] + length)
        cuts.append(len(text) if place < 0 else place)
    return [text[a:b] for a, b in pairwise(cuts)]


PASSAGE = 10
"""Characters a token: ample for one window of ordinary text, so a passage need not be tokenised further."""
LIKELY, SPARE = 5, 32
"""Characters a token that most texts have, and tokens behind a window by which it depends no more on what follows."""


def first_window(tokenizer: Callable[..., Any], passage: str, context: int, what: str) -> Tensor:
    """The first of :func:`windows` of ``passage``, (context,). Where a part of it has tokens to spare, the rest is not
    read."""
    with suppress(InputError):
        part = passage[: LIKELY * (context + SPARE)]
        return windows(tokenizer, part, context + SPARE, what)[0, :context]
    return windows(tokenizer, passage, context, what)[0]


def calibration(
    tokenizer: Callable[..., Any], source: str | Path | None, samples: int, context: int, seed: int
) -> Calibration:
    """``samples`` windows of ``context`` tokens drawn without replacement with ``seed``, from ``source`` or the bundle.

    A text long enough is cut into passages, and the first window of each one drawn is taken; of a shorter text, any
    window can be drawn.

    Raises:
        InputError: the text is empty or shorter than one window. Fewer windows than ``samples`` are all taken.
    """
    text = calibration_text() if source is None else read_text(source)
    what = BUNDLED if source is None else str(source)
    pieces = passages(text, PASSAGE * context)[:-1]  # the last one may be short
    order = torch.Generator().manual_seed(seed)
    if len(pieces) >= samples:
        drawn = torch.randperm(len(pieces), generator=order)[:samples].sort().values.tolist()
        with suppress(InputError):  # a passage with too few tokens: choose among all windows instead
            first = [first_window(tokenizer, pieces[index], context, f"calibration text {what}") for index in drawn]
            return Calibration(what, torch.stack(first))
    pool = windows(tokenizer, text, context, f"calibration text {what}")
    drawn = torch.randperm(len(pool), generator=order)[:samples].sort().values.tolist()
    return Calibration(what, pool[drawn].contiguous())


def probe(tokenizer: Callable[..., Any], samples: int, context: int) -> Tensor:
    """Held-out windows (samples, context), spread over the bundled text: what a run checks itself on."""
    pieces = passages(heldout_text(), PASSAGE * context)[:-1]
    chosen = pieces[:: max(1, len(pieces) // samples)][:samples]
    return torch.stack([first_window(tokenizer, piece, context, "bundled held-out text") for piece in chosen])
