# SPDX-License-Identifier: Apache-2.0
"""Facts of many layers over many batches, collected in parallel and merged in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import Tensor

from fewbit.core.facts import Facts

Key = tuple[str, int]


class Enough(Exception):
    """Raised inside a block once all its inputs were seen: what it would still compute, nobody needs."""


class Observer:
    """A callback for ``StreamedModel.observe``. Layers that share an input (q, k, v; gate, up) share its facts.

    ``grams``: names of the sites whose method needs E[x x^T]. ``complete``: raise :class:`Enough` when a batch has
    brought facts of this many sites; 0 where that cannot be known (experts see what is routed to them). Each thread
    fills the batch it opened.
    """

    def __init__(self, grams: set[str], complete: int) -> None:
        self._grams, self._complete = grams, complete
        self._local = threading.local()
        self._total: dict[Key, Facts] = {}

    @contextmanager
    def batch(self) -> Iterator[dict[Key, Facts]]:
        self._local.found, self._local.last = {}, None
        with suppress(Enough):
            yield self._local.found
        self._local.last = None

    def __call__(self, site: str, x: Tensor, expert: int | None) -> None:
        gram = site in self._grams
        last = self._local.last
        # The last input is kept alive, so an equal address means the same tensor, not a reused one.
        if last is None or last[0].data_ptr() != x.data_ptr() or last[0].shape != x.shape or last[1] != gram:
            last = self._local.last = (x, gram, Facts.of(x, gram))
        self._local.found[site, expert or 0] = last[2]
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
