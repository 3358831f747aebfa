# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: many texts through one engine, each step one token of all that are being written and a piece of
the prompts that are still being read.

One thread owns the engine. Others submit jobs and are called back, so that a slow reader delays nobody.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fewbit.decode.engine import Engine
from fewbit.decode.job import Job, Piece
from fewbit.decode.prefixes import REUSE, Prefixes, shared
from fewbit.decode.sampling import Sampler, Sampling, logprobs, sample
from fewbit.decode.text import Words
from fewbit.errors import FewbitError, InputError, SpecError

LOOKAHEAD = 32
"""Waiting jobs that are looked at in a step."""
SCORED = 1 << 20
"""Logits after the tokens of a prompt that are held at once, 4 MiB."""


class Busy(FewbitError):
    """As many jobs wait as may. Trying again later works."""


class Stopped(FewbitError):
    """The engine is stopping."""


@dataclass
class Stats:
    """What happens now, and what happened since the start (the counts of tokens and steps)."""

    running: int = 0
    waiting: int = 0
    kept: int = 0
    cache_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class Limits:
    """``running`` texts are written at once, ``waiting`` may wait. ``kept`` caches of finished ones have room of their
    own, so that an engine needs ``running + kept`` sequences. A step reads ``chunk`` tokens of prompts while texts are
    being written, ``alone`` while none is."""

    running: int = 8
    waiting: int = 256
    kept: int = 4
    chunk: int = 128
    alone: int = 512

    def __post_init__(self) -> None:
        if min(self.running, self.waiting) < 1 or self.kept < 0 or min(self.chunk, self.alone) < self.running:
            raise SpecError(f"{self}", "", "chunks of at least one token for each running text would work")


@dataclass
class Batcher:
    """Runs jobs on ``engine`` in a thread of its own, from the first one submitted until :meth:`close`."""

    engine: Engine
    words: Words
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._prefixes = Prefixes(self.engine, self.limits.running + self.limits.kept)
        self._stats = Stats()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        deliver: Callable[[Piece], None],
        branch: int = 0,
        scored: bool = False,
    ) -> Job:
        """Begin a text after ``prompt``; ``deliver`` is called by the engine's thread and must not block. ``scored``:
        find the logarithms of the prompt's tokens too, with as many alternatives as ``sampling`` asks for.

        Raises:
            InputError: the prompt is empty, has a token beyond the vocabulary, or leaves no room in the context.
            SpecError: ``sampling`` asks for more than the context has room for, or a token beyond the vocabulary.
            Busy: the queue is full. Stopped: after :meth:`close`.
        """
        room = self.engine.context - len(prompt)
        if not prompt:
            raise InputError("generating", "the prompt holds no token", "some text")
        if room < 1:
            raise InputError(
                f"a prompt of {len(prompt)} tokens", f"the context has {self.engine.context}", "a shorter one"
            )
        if not all(0 <= token < self.engine.vocab_size for token in prompt):
            raise InputError("a prompt of tokens", "one is not of the vocabulary", f"below {self.engine.vocab_size}")
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            found = f"the context has {self.engine.context}, the prompt takes {len(prompt)}"
            raise SpecError(f"max_tokens {sampling.max_tokens}", found, f"at most {room}")
        sampler = Sampler(sampling, prompt, self.engine.vocab_size, branch)
        most = room if sampling.max_tokens is None else sampling.max_tokens
        job = Job(prompt, sampler, self.words, deliver, most, scored)
        with self._changed:
            if self._closing:
                raise Stopped("one more text", "the engine is stopping")
            if len(self._waiting) >= self.limits.waiting:
                raise Busy("one more text", f"{len(self._waiting)} are waiting", "try again later")
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fewbit-engine", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Stop ``job`` before its next token; harmless when it is over."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """The pieces of one text as they come. Raises what :meth:`submit` does, and the error of the text itself."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        job = self.submit(prompt, sampling, pieces.put)
        try:
            while True:
                piece = pieces.get()
                if piece.error is not None:
                    raise piece.error
                yield piece
                if piece.last:
                    return
        finally:
            self.cancel(job)

    def stats(self) -> Stats:
        with self._changed:
            now = {"running": len(self._active), "waiting": len(self._waiting), "kept": len(self._prefixes)}
            return replace(self._stats, **now)

    def close(self) -> None:
        """End all jobs with an error, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._active)
                if self._closing:
                    break
            try:
                self._step()
            except Exception as error:  # a defect of ours: these jobs are lost, the thread is not
                self._fail_all(error)
        self._fail_all(Stopped("the rest of the text", "the engine is stopping"))

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._score()
        fed = self._feed(self._plan())
        ready = [(job, row) for job, row in fed if not job.left and not self._through(job)]
        self._next([job for job, _ in ready], [row for _, row in ready])
        self._stats.steps += 1
        self._stats.cache_bytes = self.engine.nbytes()

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled]
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in [job for job in self._active if job.cancelled]:
            self._retire(job)
            gone.append(job)
        for job in gone:
            job.drop()

    def _admit(self) -> None:
        """Begin waiting jobs, first come first served, while there is room. One whose prompt begins as that of a job
        that is still reading waits: copying what the other computes is faster than computing it beside it."""
        with self._changed:
            waiting = list(itertools.islice(self._waiting, LOOKAHEAD))
        for job in waiting:
            if len(self._active) >= self.limits.running:
                return
            running = [(other.sequence, other.tokens[: other.fed]) for other in self._active]
            known = () if job.scored else job.prompt  # a cache holds no logits
            found = self._prefixes.longest(known, running)
            soon = max((shared(known, other.prompt) for other in self._active if other.reading), default=0)
            if min(soon, len(known) - 1) >= found + REUSE:
                continue
            with self._changed:
                self._waiting.remove(job)
            try:
                job.sequence, job.fed = self._prefixes.begin(known, running)
            except Exception as error:
                job.fail(error)
                continue
            job.reused = job.fed
            self._stats.prompt_tokens += len(job.prompt)
            self._stats.reused_tokens += job.reused
            self._active.append(job)

    def _plan(self) -> list[tuple[Job, int]]:
        """How many tokens of each job go into the next pass: one of a text; of prompts an even share of the chunk, what
        short ones leave going to the longer."""
        reading = [job for job in self._active if job.left > 1 and not job.unscored]
        reading.sort(key=lambda job: job.left)
        plan = [(job, 1) for job in self._active if job.left == 1]
        budget = self.limits.chunk if plan else self.limits.alone
        for index, job in enumerate(reading):
            count = min(job.left, budget // (len(reading) - index))
            plan.append((job, count))
            budget -= count
        return plan

    def _score(self) -> None:
        """Read a piece of each prompt whose tokens' logarithms are asked for."""
        for job in [job for job in self._active if job.unscored]:
            count = min(job.unscored, max(SCORED // self.engine.vocab_size, 1))
            try:
                rows = self.engine.feed_every(job.sequence, job.tokens[job.fed : job.fed + count])
                following = job.tokens[job.fed + 1 : job.fed + 1 + count]
                most = job.sampler.sampling.logprobs or 0
                job.scores += [logprobs(row, token, most) for row, token in zip(rows, following, strict=True)]
                job.fed += count
            except Exception as error:
                self._fail(job, error)

    def _through(self, job: Job) -> bool:
        """Whether nothing is to be drawn of ``job``, which is at its end then."""
        if job.generated < job.most:
            return False
        job.end("length")
        self._retire(job)
        return True

    def _feed(self, plan: list[tuple[Job, int]]) -> list[tuple[Job, memoryview[float]]]:
        """One pass; (vocab) logits after the last token of each job. Where a pass fails, its jobs run one by one, so
        that only the one at fault ends."""
        if not plan:
            return []
        try:
            logits = self.engine.feed_rows(
                [(job.sequence, job.tokens[job.fed : job.fed + count]) for job, count in plan]
            )
        except Exception as error:
            if len(plan) == 1:
                self._fail(plan[0][0], error)
                return []
            alone = (fed for entry in plan if self._rewound(entry[0]) for fed in self._feed([entry]))
            return [(job, _copied(row)) for job, row in alone]
        for job, count in plan:
            job.fed += count
        return [(job, row) for (job, _), row in zip(plan, logits, strict=True)]

    def _rewound(self, job: Job) -> bool:
        """Whether the engine could forget what a failed pass may have left behind."""
        try:
            self.engine.keep(job.sequence, job.fed)
        except Exception as error:
            self._fail(job, error)
            return False
        return True

    def _next(self, jobs: list[Job], rows: list[memoryview[float]]) -> None:
        """Draw a token of each job and tell whoever asked."""
        if not jobs:
            return
        counts = [job.sampler.sampling.logprobs for job in jobs]
        kept = [None if count is None else _copied(row) for row, count in zip(rows, counts, strict=True)]
        tokens = sample(rows, [job.sampler for job in jobs])  # overwrites them
        for job, row, count, token in zip(jobs, kept, counts, tokens, strict=True):
            try:
                if isinstance(token, InputError):
                    raise token
                ended = job.take(token, None if row is None or count is None else logprobs(row, token, count))
            except Exception as error:
                self._fail(job, error)
                continue
            self._stats.generated_tokens += 1
            if ended:
                self._retire(job)

    def _retire(self, job: Job) -> None:
        self._active.remove(job)
        self._prefixes.keep(job.sequence, job.tokens[: job.fed])

    def _fail(self, job: Job, error: Exception) -> None:
        self._active.remove(job)
        self._prefixes.drop(job.sequence)
        job.fail(error)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.fail(error)
        for job in list(self._active):
            self._fail(job, error)
        self._prefixes.clear()


def _copied(row: memoryview[float]) -> memoryview[float]:
    return memoryview(bytearray(row)).cast("f")
