# SPDX-License-Identifier: Apache-2.0
"""Facts of many layers over many batches, collected in parallel and merged in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.errors import of_layer

Key = tuple[str, int]
T = TypeVar("T")


class Enough(Exception):
    """Raised inside a block once all its inputs were seen: what it would still compute, nobody needs."""


class Shared(Generic[T]):
    """What ``make`` gives of an input, made once for layers that share it (q, k, v; gate, up)."""

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._last: tuple[Tensor, tuple[bool, ...], T] | None = None

    def of(self, x: Tensor, *options: bool) -> T:
        last = self._last
        # The last input is kept alive, so an equal address means the same tensor, not a reused one.
        if last is None or last[0].data_ptr() != x.data_ptr() or last[0].shape != x.shape or last[1] != options:
            last = self._last = (x, options, self._make(x, *options))
        return last[2]


class Observer:
    """A callback for ``StreamedModel.observe``. Layers that share an input share its facts.

    ``grams``: names of the sites whose method needs E[x x^T]; ``ranges``: of those whose histograms are kept.
    ``complete``: raise :class:`Enough` when a batch has
    brought facts of this many sites; 0 where that cannot be known (experts see what is routed to them). Each thread
    fills the batch it opened.
    """

    def __init__(self, grams: set[str], complete: int, ranges: frozenset[str] = frozenset()) -> None:
        self._grams, self._complete, self._ranges = grams, complete, ranges
        self._local = threading.local()
        self._total: dict[Key, Facts] = {}

    @contextmanager
    def batch(self) -> Iterator[dict[Key, Facts]]:
        self._local.found, self._local.facts = {}, Shared(Facts.of)
        with suppress(Enough):
            yield self._local.found
        del self._local.facts

    def __call__(self, site: str, x: Tensor, expert: int | None) -> None:
        with of_layer(site):
            self._local.found[site, expert or 0] = self._local.facts.of(x, site in self._grams, site in self._ranges)
        if len(self._local.found) == self._complete:
            raise Enough

    def merge(self, found: dict[Key, Facts]) -> None:
        """Add a batch; call in the order of the batches."""
        merged: dict[tuple[int, int], Facts] = {}
        for key, facts in found.items():
            before = self._total.get(key)
            if before is None:
                self._total[key] = facts
                continue
            pair = (id(before), id(facts))
            if pair not in merged:
                merged[pair] = before.merge(facts)
            self._total[key] = merged[pair]

    def facts(self, site: str, expert: int, columns: int) -> Facts:
        return self._total.get((site, expert), Facts.none(columns))
