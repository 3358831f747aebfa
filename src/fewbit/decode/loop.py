# SPDX-License-Identifier: Apache-2.0
"""One text at a time: feed, choose, feed what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewbit.containers.files import read_json
from fewbit.decode.engine import Engine
from fewbit.errors import InputError

Choice = Callable[[Tensor], int]
"""From the logits of the next token, float32 (vocab_size,), to its id."""


def likeliest(logits: Tensor) -> int:
    """Greedy decoding; of equal ones the first."""
    return int(logits.argmax())


def drawn(temperature: float, seed: int) -> Choice:
    """Tokens drawn with probability ``softmax(logits / temperature)``; the same seed, the same tokens."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        shares = torch.softmax((logits - logits.max()).double() / temperature, 0)
        return int(torch.multinomial(shares, 1, generator=generator))

    return choose


def continuation(
    engine: Engine, prompt: Sequence[int], most: int, choose: Choice = likeliest, ends: Collection[int] = ()
) -> Iterator[int]:
    """The tokens after ``prompt``, as they come: at most ``most``, up to one of ``ends`` (which is given too), and no
    more than the context has room for.

    Raises:
        InputError: ``prompt`` is empty, too long, or holds what is no token.
    """
    if len(prompt) >= engine.context:
        found = f"{len(prompt)} tokens; the context has {engine.context} positions"
        raise InputError("continuing the prompt", found, f"at most {engine.context - 1} tokens")
    sequence = engine.open()
    try:
        logits = engine.feed([(sequence, prompt)])[0]
        for left in range(min(most, engine.context - len(prompt)), 0, -1):
            token = choose(logits)
            yield token
            if token in ends or left == 1:
                return
            logits = engine.feed([(sequence, [token])])[0]
    finally:
        engine.close(sequence)


def end_tokens(folder: Path) -> frozenset[int]:
    """Ids that end a text, as generation_config.json or config.json of ``folder`` name them."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset(int(token) for token in (found if isinstance(found, list) else [found]))
    return frozenset()
