# SPDX-License-Identifier: Apache-2.0
"""One text being written: its tokens, what of them is already certain to be shown, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fewbit.decode.sampling import Logprobs, Sampler
from fewbit.decode.text import StopStrings, Words

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Piece:
    """News of a job. The last one has ``finish`` or ``error``.

    ``tokens``: those that came since the piece before, each with its logarithms where they were asked for.
    """

    text: str = ""
    tokens: tuple[tuple[int, Logprobs | None], ...] = ()
    finish: Finish | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


class Job:
    """``generated``: tokens written. ``reused``: tokens of the prompt that were not computed anew. ``scored``: whether
    the logarithms of the prompt's tokens are asked for; ``scores``: those of all but the first, which nothing predicts,
    as they are read.

    ``sequence`` of the engine has seen the first ``fed`` of ``tokens``, which are the prompt and what follows.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        words: Words,
        deliver: Callable[[Piece], None],
        most: int,
        scored: bool = False,
    ) -> None:
        self.prompt, self.tokens = tuple(prompt), list(prompt)
        self.sampler, self.most = sampler, most
        self.scored = scored
        self.scores: list[Logprobs] = []
        self.generated = self.reused = 0
        self.cancelled = False
        self.sequence = -1
        self.fed = 0
        self._deliver = deliver
        self._stream = words.stream(prompt)
        self._stops = StopStrings(sampler.sampling.stop)
        self._ends = frozenset() if sampler.sampling.ignore_eos else words.ends
        self._news: list[tuple[int, Logprobs | None]] = []

    @property
    def left(self) -> int:
        """Tokens that the engine has not seen."""
        return len(self.tokens) - self.fed

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is still to be fed."""
        return self.fed < len(self.prompt)

    @property
    def unscored(self) -> int:
        """Tokens of the prompt to be fed of which the logits after each are asked for: all but the last."""
        return max(len(self.prompt) - 1 - self.fed, 0) if self.scored else 0

    def take(self, token: int, logs: Logprobs | None) -> bool:
        """Add a token and deliver what it brought; whether the text is at its end."""
        self.generated += 1
        if token in self._ends:
            self.end("stop")
            return True
        self.sampler.take(token)
        self.tokens.append(token)
        self._news.append((token, logs))
        text = self._stops.push(self._stream.push(token))
        if self._stops.stopped:
            self._send(Piece(text, tuple(self._news), "stop"))
            return True
        if self.generated == self.most:
            self.end("length", text)
            return True
        if text or logs is not None:
            self._send(Piece(text, tuple(self._news)))
            self._news.clear()
        return False

    def end(self, finish: Finish, text: str = "") -> None:
        """Deliver what was held back, and that nothing follows."""
        text += self._stops.push(self._stream.finish())
        text += self._stops.finish()
        self._send(Piece(text, tuple(self._news), "stop" if self._stops.stopped else finish))

    def drop(self) -> None:
        """Deliver that nobody wants the rest."""
        self._send(Piece(finish="cancelled"))

    def fail(self, error: Exception) -> None:
        self._send(Piece(error=error))

    def _send(self, piece: Piece) -> None:
        try:
            self._deliver(piece)
        except Exception:  # whoever asked is gone (a closed event loop); the others are not
            self.cancelled = True
