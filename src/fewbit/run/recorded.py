# SPDX-License-Identifier: Apache-2.0
"""A step on a GPU as one call, where starting its many small kernels takes longer than they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Part = tuple[Tensor, ...]
R = TypeVar("R")


class Recorded(Generic[R]):
    """``function`` of some tuples of tensors, as many and of the same shapes each time.

    On a GPU its kernels are recorded in the second call (the first prepares libraries) and started again, all at once,
    in each one after: what else it reads must stay where it is in memory, and a result lasts until the next call. On a
    CPU, and where it cannot be recorded since it waits for the GPU or copies to it, it is called as it is.
    """

    def __init__(self, function: Callable[[Iterable[Part]], R], device: torch.device) -> None:
        self._function, self._left_alone, self._first = function, device.type != "cuda", True
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Iterable[Part]) -> R:
        if self._left_alone:
            return self._function(given)
        parts = list(given)
        if self._first:
            self._first = False
            return self._aside(parts)
        if self._graph is None and not self._record(parts):
            self._left_alone = True
            return self._function(parts)
        assert self._graph is not None
        for part, held in zip(parts, self._held, strict=True):
            for tensor, place in zip(part, held, strict=True):
                place.copy_(tensor)
        self._graph.replay()
        return self._result

    def _aside(self, parts: list[Part]) -> R:
        """On another stream than the one in use, as recording is."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self._function(parts)
        current.wait_stream(stream)
        return result

    def _record(self, parts: list[Part]) -> bool:
        """Whether that can be done."""
        graph, self._held = torch.cuda.CUDAGraph(), [tuple(map(torch.empty_like, part)) for part in parts]
        try:
            with torch.cuda.graph(graph):
                self._result = self._function(self._held)
        except RuntimeError:
            return False
        self._graph = graph
        return True
