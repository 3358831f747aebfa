# SPDX-License-Identifier: Apache-2.0
"""From harms to choices: estimated once, or measured in rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fewbit.model.sites import Site
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Rule
from fewbit.run.events import Event, Progress
from fewbit.run.facts import KeptFacts
from fewbit.run.workers import Workers
from fewbit.search import candidates as C
from fewbit.search import harm
from fewbit.search.divergence import Divergence
from fewbit.search.knapsack import Harms, choose
from fewbit.search.table import Table, Unit


@dataclass(frozen=True, eq=False)
class Found:
    """``chosen``: a candidate's index for every unit; ``harms`` (units, candidates) of each unit alone in float
    surroundings, nats a token; ``bound`` of the estimates; ``measured``: KL of the model as chosen, and ``uniform``: as
    all layers in each candidate, where these were measured."""

    chosen: tuple[int, ...]
    harms: Harms
    bound: float | None = None
    measured: float | None = None
    uniform: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Layers:
    """Layers of the model in each candidate. ``stand_in``: a method for estimates that is tried in place of those of
    the candidates, where it takes their format; None for their own."""

    model: StreamedModel
    kept: KeptFacts
    workers: Workers
    stand_in: str | None = None

    def weight(self, site: Site) -> Tensor:
        return self.model.weight(site.name).float().reshape(-1, site.shape[1])

    def solve(self, work: tuple[Site, Rule]) -> C.Solution:
        site, rule = work
        return C.solve(C.fitted_by(rule, self.stand_in), self.weight(site), C.known_of(self.kept, site))


class Pace:
    """Tells of units, and how long the rest will take."""

    def __init__(self, tell: Progress, steps: int) -> None:
        self._tell, self._steps, self._done, self._began = tell, steps, 0, time.monotonic()

    def step(self, name: str, harms: Harms) -> None:
        """A unit is done."""
        self._done += 1
        pace = (time.monotonic() - self._began) / self._done
        left, found = pace * (self._steps - self._done), " ".join(f"{value:.4f}" for value in harms)
        progress = {"block": self._done, "blocks": self._steps, "seconds": pace, "eta_seconds": left}
        self._tell(Event("layer", name=name, message=found, **progress))  # type: ignore[arg-type]


def estimated(table: Table, budget: int, by: str, layers: Layers, tell: Progress) -> Found:
    """By :mod:`fewbit.search.harm`, block by block; only one is in memory at a time."""
    harms, pace = np.empty(table.costs.shape), Pace(tell, len(table.units))
    model, text = layers.model, layers.kept.described["calibration"]
    half = text["context"] / (2 * text["samples"])

    def one(work: tuple[Site, Rule]) -> float:
        weight = layers.weight(work[0])
        values = C.values(layers.solve(work))
        return harm.of_layer(by, weight, values, C.known_of(layers.kept, work[0]), half)

    for block in sorted({unit.block for unit in table.units}):
        with model.loaded(model.blocks[block]):
            for at, unit in enumerate(table.units):
                if unit.block != block:
                    continue
                work = [(site, rule) for rule in table.rules for site in unit.sites]
                found = np.array(list(layers.workers.map(one, work)))
                harms[at] = found.reshape(len(table.rules), -1).sum(1)
                pace.step(unit.name, harms[at])
    choices = choose(table.costs, harms, budget)
    return Found(choices.chosen, harms, choices.bound)


def measured(table: Table, budget: int, ids: Tensor, rounds: int, layers: Layers, tell: Progress) -> Found:
    """By :mod:`fewbit.search.divergence`. The first round changes one unit at a time in the float model; each of the
    others one at a time in the best model so far. Of what was chosen and of each candidate for all layers, as far as it
    fits, the one of least KL, measured as a whole, is taken."""
    model, width = layers.model, len(table.rules)
    model.load("")
    tell(Event("note", message=f"{len(table.units)} units x {width} candidates on {len(ids)} windows, {rounds} rounds"))
    pace, whole = Pace(tell, rounds * len(table.units)), Divergence(model, ids, layers.workers)
    every = [(site, rule) for unit in table.units for site in unit.sites for rule in table.rules]
    solved = iter(list(layers.workers.map(layers.solve, every)))
    made = {site.name: [next(solved) for _ in table.rules] for unit in table.units for site in unit.sites}

    def weights(unit: Unit, candidate: int) -> dict[str, Tensor]:
        return {site.name: C.values(made[site.name][candidate]) for site in unit.sites}

    def put(chosen: tuple[int, ...]) -> float:
        for unit, at in zip(table.units, chosen, strict=True):
            whole.put(weights(unit, at))
        return whole.now()

    first = harms = _round(table, whole, weights, pace)
    uniform = tuple(put((at,) * len(table.units)) for at in range(width))
    fitting = [at for at in range(width) if int(table.costs[:, at].sum()) <= budget]
    best = min(((uniform[at], (at,) * len(table.units)) for at in fitting), default=(math.inf, ()))
    for last in range(rounds):
        if last:
            put(best[1])
            harms = _round(table, whole, weights, pace)
        choices = choose(table.costs, harms, budget)
        kl = put(choices.chosen)
        tell(Event("note", message=f"round {last + 1}: KL {kl:.4f} at {table.bits(choices.cost):.3f} bits"))
        if kl < best[0]:
            best = kl, choices.chosen
        elif last:
            break  # the next round would start where this one did
    return Found(best[1], first, None, best[0], uniform)


def _round(table: Table, whole: Divergence, weights: Callable[[Unit, int], dict[str, Tensor]], pace: Pace) -> Harms:
    """KL with each unit in each candidate, all others as they are."""
    harms = np.empty(table.costs.shape)
    for measure in whole.blocks():
        for at, unit in enumerate(table.units):
            if unit.block == measure.block:
                harms[at] = [measure.of(weights(unit, candidate)) for candidate in range(len(table.rules))]
                pace.step(unit.name, harms[at])
    return harms
