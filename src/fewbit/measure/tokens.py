# SPDX-License-Identifier: Apache-2.0
"""The text a model is scored on, cut into equal windows that do not overlap."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit import calibrate
from fewbit.errors import InputError

HELDOUT = "bundled held-out text (public domain)"
PROBE_CHARACTERS = 20_000


@dataclass(frozen=True, eq=False)
class Windows:
    """``ids`` (windows, context) int64; ``bos`` when each window starts with a BOS that is not of the text."""

    source: str
    ids: Tensor
    bos: bool

    @property
    def sha256(self) -> str:
        """Hash of the token ids: two evaluations compare only when it is the same."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def cut(
    tokenizer: Any, text: str | Path | Tensor | None, context: int, max_tokens: int | None, unscored: int
) -> Windows:
    """Windows of ``context`` tokens, or one smaller window where the text (or ``max_tokens``) is shorter than that.

    Raises:
        InputError: the text is missing, empty, or so short that no token would be scored.
    """
    if isinstance(text, Tensor):
        source, ids, bos = "token ids given by the caller", text.reshape(-1).to("cpu", torch.int64), False
        context = min(context, len(ids), max_tokens or len(ids))
        _long_enough(source, context, unscored)
        pool = ids[: len(ids) // context * context].reshape(-1, context)
    else:
        source = HELDOUT if text is None else str(text)
        content = calibrate.heldout_text() if text is None else calibrate.read_text(text)
        length = len(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])
        context = min(context, length, max_tokens or length)
        _long_enough(source, context, unscored)
        pool = calibrate.windows(tokenizer, content, context, source)
        bos = starts_with_bos(tokenizer)
    return Windows(source, pool[: max(1, max_tokens // context)] if max_tokens else pool, bos)


def _long_enough(source: str, context: int, unscored: int) -> None:
    if context <= unscored:
        raise InputError(
            f"evaluate on {source}", f"a window of {context} tokens, of which the first {unscored} are not scored",
            "give a longer text",
        )  # fmt: skip


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a text of its own accord."""
    first = tokenizer("a")["input_ids"][:1]
    return bool(first) and first[0] == tokenizer.bos_token_id


def same_vocabulary(tokenizer: Any, other: Any) -> bool:
    """Whether both tokenizers give the same ids for the beginning of the held-out text."""
    sample = calibrate.heldout_text()[:PROBE_CHARACTERS]
    first, second = (t(sample, add_special_tokens=False, verbose=False)["input_ids"] for t in (tokenizer, other))
    return bool(first == second)
