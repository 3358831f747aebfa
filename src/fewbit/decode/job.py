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

    ``tokens``: those that ``text`` is of, each with its logarithms where they were asked for; so none of a stop string,
    but one that begins before it. Those of no text come with the next that has some, or last.
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
        self._news: list[tuple[int, tuple[int, Logprobs | None]]] = []
        """Tokens that were not delivered, each after the characters of the text before it."""
        self._certain = self._shown = 0  # characters: of the text, and of what was delivered

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
        self._news.append((self._certain, (token, logs)))
        text = self._push(self._stream.push(token))
        if self._stops.stopped:
            self._send(Piece(text, self._of(text), "stop"))
            return True
        if self.generated == self.most:
            self.end("length", text)
            return True
        if text:
            self._send(Piece(text, self._of(text)))
        return False

    def end(self, finish: Finish, text: str = "") -> None:
        """Deliver what was held back, and that nothing follows."""
        text += self._push(self._stream.finish())
        text += self._stops.finish()
        stopped = self._stops.stopped
        tokens = self._of(text) if stopped else tuple(token for _, token in self._news)
        self._send(Piece(text, tokens, "stop" if stopped else finish))

    def _push(self, text: str) -> str:
        self._certain += len(text)
        return self._stops.push(text)

    def _of(self, text: str) -> tuple[tuple[int, Logprobs | None], ...]:
        """The tokens of ``text``, which is delivered now."""
        self._shown += len(text)
        count = sum(begin < self._shown for begin, _ in self._news)
        ready, self._news = self._news[:count], self._news[count:]
        return tuple(token for _, token in ready)

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
