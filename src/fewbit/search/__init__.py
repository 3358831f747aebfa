# SPDX-License-Identifier: Apache-2.0
"""Bits where they are needed: a format for each layer, within a budget of true bits. See :func:`allocate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewbit import methods
from fewbit.calibrate import Text
from fewbit.core.defaults import exact
from fewbit.errors import SpecError
from fewbit.model.checkpoint import open_checkpoint
from fewbit.model.stream import StreamedModel
from fewbit.recipe import Recipe
from fewbit.run import opening as O
from fewbit.run.events import Progress
from fewbit.run.facts import KeptFacts
from fewbit.run.workers import workers
from fewbit.search import candidates as C
from fewbit.search import table as T
from fewbit.search.rounds import Found, Layers, estimated, measured

By = Literal["output", "fisher", "kl"]


@dataclass(frozen=True)
class Chosen:
    """What a layer gets. ``bits``: true bits a weight. ``harm``: of its unit alone, shared out by weights; nats a
    token."""

    name: str
    kind: str
    candidate: str
    bits: float
    weights: int
    harm: float


@dataclass(frozen=True)
class Uniform:
    """All layers in one candidate. ``expected``: the sum of their harms; ``measured``: KL, by ``kl`` alone."""

    candidate: str
    bits: float
    expected: float
    measured: float | None


@dataclass(frozen=True)
class Allocation:
    """``recipe`` and what speaks for it. ``bits``: true bits a weight of the layers of the blocks, at most ``budget``;
    ``expected`` and ``measured`` as in :class:`Uniform`; estimates say that no choice within the budget does better
    than ``bound``."""

    recipe: Recipe
    by: str
    budget: float
    bits: float
    expected: float
    measured: float | None
    bound: float | None
    layers: tuple[Chosen, ...]
    uniform: tuple[Uniform, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {key: value for key, value in vars(self).items() if key not in ("recipe", "layers", "uniform")}
        rows = {"layers": [vars(row) for row in self.layers], "uniform": [vars(row) for row in self.uniform]}
        return {**plain, **rows, "recipe": self.recipe.to_dict()}


@exact()
def allocate(
    model: str | Path,
    budget: float,
    *,
    facts: str | Path,
    candidates: Sequence[str] = C.DEFAULT,
    method: str = "gptq",
    by: By = "output",
    unit: T.UnitOf = "layer",
    estimate: str | None = None,
    head: str = "int8/g64",
    calibration: str | Path | None = None,
    samples: int = 8,
    context: int = 256,
    seed: int = 1,
    rounds: int = 2,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Allocation:
    """Choose a candidate for each layer of the blocks of ``model``, of least harm within ``budget``.

    Args:
        model: a Hugging Face folder, a ``.gguf`` file, or a hub id.
        budget: true bits a weight of the layers of the blocks: codes, scales, zero points, tables, everything.
        facts: a folder of :func:`fewbit.collect` of this model.
        candidates: formats (``"int3/g64/asym"``), fitted by ``method``, or with their own (``"palette3/row:skm"``). The
            same format by two methods lets each layer have the one of less harm.
        by: the harm of a change: ``output``, the layer's output error weighted by gradients; ``fisher``, the error
            under the Fisher diagonal; ``kl``, the divergence of the model with this unit changed, measured on text.
        unit: what shares a candidate, each ``layer`` or all layers of a ``block``.
        estimate: a cheap method (``rtn``, ``clip``) to find errors with in place of the candidates' own; not by ``kl``.
        head: format of embedding and head, or "float"; outside of the budget.
        calibration, samples, context, seed: the text that ``kl`` is measured on, as in :func:`fewbit.quantize`.
        rounds: of ``kl``; from the second on, changes are measured in the best model so far, not in the float one. What
            is chosen measures no worse than any one candidate for all layers that fits.
        threads, force, progress: as in :func:`fewbit.quantize`.

    Raises:
        SpecError: the budget is out of reach, a candidate or an option does not exist.
        InputError: the facts are of another model, or lack what is needed.
    """
    _check(by, unit, rounds, estimate)
    rules, tell = C.parse(candidates, method), progress or O.silent
    checkpoint = open_checkpoint(model)
    streamed = StreamedModel.open(checkpoint)
    table = T.make(checkpoint, streamed, rules, head, unit, force)
    limit = table.budget(budget)
    kept = KeptFacts.read(facts)
    kept.check(O.model_hashes(checkpoint))
    T.check_facts(table, kept, by, estimate)
    with workers(threads) as pool:
        layers = Layers(streamed, kept, pool, estimate)
        if by == "kl":
            text = Text(samples, context, calibration)
            ids = O.draw(checkpoint, checkpoint.tokenizer(), text, seed, tell).ids
            found = measured(table, limit, ids, rounds, layers, tell)
        else:
            found = estimated(table, limit, by, layers, tell)
    return _allocation(streamed, table, found, by, budget)


def _check(by: str, unit: str, rounds: int, estimate: str | None) -> None:
    if by not in ("output", "fisher", "kl") or unit not in ("layer", "block") or rounds < 1:
        found = f"by={by!r}, unit={unit!r}, rounds={rounds}"
        works = "by output, fisher or kl; unit layer or block; one round or more"
        raise SpecError("allocating bits", found, works)
    if estimate is not None:
        methods.named(estimate)
        if by == "kl":
            raise SpecError(f"estimate {estimate} by kl", "kl is measured on what a run makes", "leave one of them out")


def _allocation(model: StreamedModel, table: T.Table, found: Found, by: str, budget: float) -> Allocation:
    rows = []
    for at, (unit, chosen) in enumerate(zip(table.units, found.chosen, strict=True)):
        weights, prefix = sum(site.parameters for site in unit.sites), f"{model.blocks[unit.block]}."
        bits, harm = 8 * int(table.costs[at, chosen]) / weights, float(found.harms[at, chosen]) / weights
        rows += [
            Chosen(
                site.name,
                site.name.removeprefix(prefix),
                C.spelling(table.rules[chosen]),
                bits,
                site.parameters,
                harm * site.parameters,
            )
            for site in unit.sites
        ]
    uniform = tuple(
        Uniform(
            C.spelling(rule),
            table.bits(int(table.costs[:, at].sum())),
            float(found.harms[:, at].sum()),
            found.uniform[at] if found.uniform else None,
        )
        for at, rule in enumerate(table.rules)
    )
    cost = sum(int(row[at]) for row, at in zip(table.costs, found.chosen, strict=True))
    bits, expected = table.bits(cost), sum(row.harm for row in rows)
    recipe = table.recipe(found.chosen)
    return Allocation(
        recipe,
        by,
        budget,
        bits,
        expected,
        found.measured,
        found.bound,
        tuple(rows),
        uniform,
    )


__all__ = ["Allocation", "Chosen", "Uniform", "allocate"]
