# SPDX-License-Identifier: Apache-2.0
"""A run's events as lines on stderr: one a layer, and below them a bar when stderr is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fewbit.commands.console import err
from fewbit.report import numbers as N
from fewbit.run.events import Event


class Renderer:
    """A ``progress`` callable and a context manager: ``with Renderer() as progress: quantize(...)``."""

    def __init__(self, console: Console | None = None, doing: str = "quantizing", counted: str = "blocks") -> None:
        self._console, self._doing, self._counted = console or err(), doing, counted
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._eta: float | None = None

    def __enter__(self) -> Renderer:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.eta_seconds is not None:
            self._eta = event.eta_seconds
        line = self.line(event)
        if line:
            self._console.print(line, markup=False, soft_wrap=True)
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(self._doing, total=event.blocks or None, left="", unit=self._counted)
        steps = event.kind == "step"
        done = event.block if steps else event.block or None
        named: dict[str, Any] = {"description": "learning", "unit": "steps"} if steps else {}
        self._bar.update(self._task, completed=done, total=event.blocks or None, left=self._left(), **named)

    def _left(self) -> str:
        return f"{N.seconds(self._eta)} left" if self._eta is not None else ""

    def line(self, event: Event) -> str:
        """The line that an event prints; empty when it prints none."""
        if event.kind == "note":
            return f"note: {event.message}"
        if event.kind == "step":
            return f"learning: {event.message}" if event.message else ""
        if event.kind == "start":
            return event.message or f"{event.blocks} blocks"
        if event.kind == "done":
            return f"written, read back and checked: {event.message}"
        if event.kind == "layer":
            return self._layer(event)
        return "" if self._bar is not None else self._block(event)

    def _layer(self, event: Event) -> str:
        place = f"{event.block}/{event.blocks} " if event.blocks else ""
        parts = [f"{place}{event.name:<44}"]
        if event.message and event.blocks:
            parts.append(event.message)
        if event.error is not None:
            parts.append(f"error {event.error:8.2%}")
        if event.bits is not None:
            parts.append(f"{event.bits:6.3f} bits")
        if event.seconds is not None:
            parts.append(f"{event.seconds:7.2f} s")
        if event.peak_rss_bytes is not None:
            parts.append(f"peak {N.size(event.peak_rss_bytes)}")
        if self._eta is not None:
            parts.append(self._left())
        return "  ".join(parts)

    def _block(self, event: Event) -> str:
        left = f", {self._left()}" if self._eta is not None else ""
        return f"block {event.block}/{event.blocks} written{left}"
