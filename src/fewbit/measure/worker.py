# SPDX-License-Identifier: Apache-2.0
"""A model in a process of its own, so that its peak memory is its own and two models can be timed in turns.

The parent writes one JSON command a line ("run", "linear", "finish") and reads one JSON answer a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import FewbitError, InputError
from fewbit.measure import load as L
from fewbit.measure.memory import peak_rss_bytes
from fewbit.measure.speed import Generator, Run

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fewbit.measure.worker import main; main()"


@dataclass(frozen=True)
class Job:
    """What to load and how to time it; plain data, so that it crosses to a child process."""

    path: str
    dtype: str
    prompt: Sequence[int]
    decode_tokens: int
    threads: int
    activation: str | None = None


class Here:
    """A model that already lives in this process: its peak memory includes everything else in it."""

    def __init__(self, generator: Generator, load_seconds: float | None = None) -> None:
        self.generator, self.load_seconds = generator, load_seconds

    def run(self) -> Run:
        return self.generator.run()

    def linear_share(self) -> float | None:
        return self.generator.linear_share()

    def finish(self) -> dict[str, Any]:
        """``peak_rss_bytes``, ``load_seconds`` and ``energy``: None or why it is not measurable here, ``kernels``."""
        meter = self.generator.meter
        return {
            "peak_rss_bytes": peak_rss_bytes(),
            "load_seconds": self.load_seconds,
            "energy": None if meter.source else meter.unavailable,
            "kernels": self.generator.kernels(),
        }

    def close(self) -> None:
        """Nothing to end: the model belongs to the caller."""


class Child:
    """A model in a child process, loaded by path.

    Raises:
        InputError: the child failed; its reason is in the message.
    """

    def __init__(self, job: Job) -> None:
        self.path = job.path
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - a pipe nobody drains would block the child
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps([os.path.abspath(entry or ".") for entry in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        try:
            self._ask(asdict(job))
        except BaseException:
            self.close()
            raise

    def _ask(self, command: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            reason = self.errors.read().strip().splitlines()[-1:]
            raise InputError(
                f"measure {self.path}", f"its process died: {''.join(reason) or 'killed (out of memory?)'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"measure {self.path}", answer["error"])
        return answer["value"]

    def run(self) -> Run:
        return Run(**self._ask("run"))

    def linear_share(self) -> float | None:
        share: float | None = self._ask("linear")
        return share

    def finish(self) -> dict[str, Any]:
        """As :meth:`Here.finish`; the child ends with :meth:`close`."""
        answer: dict[str, Any] = self._ask("finish")
        return answer

    def close(self) -> None:
        """End the child; safe to call twice."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def _build(job: Job) -> Here:
    torch.set_num_threads(job.threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.perf_counter()
    model = L.load_model(Path(job.path), getattr(torch, job.dtype), job.activation)
    seconds = time.perf_counter() - start
    return Here(Generator(model, torch.tensor([list(job.prompt)]), job.decode_tokens), seconds)


def main() -> None:
    """The child's loop. Answers leave by a private copy of stdout: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subject: Here | None = None
    for line in sys.stdin:
        command = json.loads(line)
        value: Any = None
        try:
            if subject is None:
                subject = _build(Job(**command))
            elif command == "run":
                value = asdict(subject.run())
            elif command == "linear":
                value = subject.linear_share()
            else:
                value = subject.finish()
            answer = {"value": value}
        except FewbitError as error:
            answer = {"error": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
