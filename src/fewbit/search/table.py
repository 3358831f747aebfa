# SPDX-License-Identifier: Apache-2.0
"""What is to be chosen: units, the layers or blocks that share one candidate, and the true bytes of each candidate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fewbit.calibrate import Text
from fewbit.errors import SpecError, UnsupportedError
from fewbit.model.checkpoint import Checkpoint
from fewbit.model.sites import Site
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe, Rule
from fewbit.run.facts import KeptFacts
from fewbit.run.planning import make_plan
from fewbit.search import candidates as C
from fewbit.search.knapsack import Costs

UnitOf = Literal["layer", "block"]


@dataclass(frozen=True)
class Unit:
    """Layers of one block that get the same candidate."""

    name: str
    block: int
    sites: tuple[Site, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """``units`` in the model's order, ``rules``: the candidates, ``costs`` (units, candidates): all bytes stored for a
    unit. ``head``: format of embedding and head, which are not in the budget."""

    units: tuple[Unit, ...]
    rules: tuple[Rule, ...]
    costs: Costs
    head: str

    @property
    def weights(self) -> int:
        return sum(site.parameters for unit in self.units for site in unit.sites)

    def bits(self, nbytes: int) -> float:
        """True bits a weight of the layers of all units."""
        return 8 * nbytes / self.weights

    def budget(self, bits: float) -> int:
        """``bits`` a weight as bytes.

        Raises:
            SpecError: they are fewer than the smallest candidates take, or more than the largest.
        """
        least, most = (self.bits(int(end.sum())) for end in (self.costs.min(1), self.costs.max(1)))
        if not least - 5e-4 <= bits <= most + 5e-4:
            found = f"these candidates take {least:.3f} to {most:.3f} true bits, scales included"
            raise SpecError(f"a budget of {bits:g} bits a weight", found, "a budget between, or other candidates")
        return max(int(bits * self.weights / 8), int(self.costs.min(1).sum()))

    def recipe(self, chosen: Sequence[int]) -> Recipe:
        """Embedding and head; layers by name; and ``*`` for those whose candidate is the most common."""
        count = Counter(at for unit, at in zip(self.units, chosen, strict=True) for _ in unit.sites)
        usual = max(count, key=lambda at: (count[at], -at))
        named = [
            replace(self.rules[at], match=site.name)
            for unit, at in zip(self.units, chosen, strict=True)
            for site in unit.sites
            if at != usual
        ]
        return Recipe((*ends(self.head), *named, self.rules[usual]))


def ends(head: str) -> tuple[Rule, Rule]:
    """The rules of embedding and head."""
    return Rule("kind:embedding", head), Rule("kind:head", head)


def make(
    checkpoint: Checkpoint, model: StreamedModel, rules: Sequence[Rule], head: str, unit: UnitOf, force: bool
) -> Table:
    """Plan the model in each candidate.

    Raises:
        FewbitError: a candidate cannot be stored for some layer, or the plan refuses it; the message names both.
    """
    sites = [site for site in model.sites if site.block is not None and site.tied_to is None]
    groups: dict[str, list[Site]] = {}
    for site in sites:
        assert site.block is not None
        groups.setdefault(site.name if unit == "layer" else model.blocks[site.block], []).append(site)
    if not sites:
        raise UnsupportedError("allocating bits", "no layer of a block can be quantized", "a model with linear layers")
    units = tuple(Unit(name, of[0].block or 0, tuple(of)) for name, of in groups.items())
    costs = np.empty((len(units), len(rules)), dtype=np.int64)
    for at, rule in enumerate(rules):
        planned = make_plan(checkpoint, model, Recipe((*ends(head), rule)), Text(), force)
        nbytes = {decision.site.name: decision.nbytes for decision in planned.decisions}
        costs[:, at] = [sum(nbytes[site.name] for site in each.sites) for each in units]
    return Table(units, tuple(rules), costs, head)


def check_facts(table: Table, kept: KeptFacts, by: str, estimate: str | None) -> None:
    """Raises InputError unless ``kept`` has what methods and estimates need."""
    needs = {C.fitted_by(rule, estimate).row().needs for rule in table.rules}
    for site in (site for unit in table.units for site in unit.sites):
        for need in sorted(needs | ({"fisher"} if by != "kl" else set())):
            kept.require(site.name, need)
