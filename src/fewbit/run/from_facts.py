# SPDX-License-Identifier: Apache-2.0
"""Which runs facts that were collected beforehand can serve, decided before any work.

Facts are of the float model as it is stored. What a quantized layer before makes of the text is not in them, so every
layer is solved, and its grid fixed, on what the float model shows: independent mode. What depends on inputs that were
rewritten since, or on the text itself, is refused. Extremes are an exception: where every channel is scaled alone, so
are they.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.calibrate import Calibration
from fewbit.errors import SpecError
from fewbit.formats.fixed import Fixed
from fewbit.model.checkpoint import Checkpoint
from fewbit.recipe import Recipe, Rule
from fewbit.run import opening as O
from fewbit.run.facts import KeptFacts
from fewbit.run.planning import Decision, Plan

TEXT = "--calibration TEXT and no --facts, which runs the text through the layers as they will be"
EXTREMES = "minmax"
"""The observer that asks for no more than the least and the largest input."""


def check_plan(facts: str | Path | None, planned: Plan, recipe: Recipe) -> None:
    """Refuse what facts, where a run is to have any, cannot tell, whatever was collected.

    Raises:
        SpecError: tuning, a rotation of the whole model under something that looks at data, or a static grid behind a
            transform, but ``minmax`` behind scales.
    """
    if facts is None:
        return
    tuned = next((name for name, rule in planned.rules.items() if rule.tunings()), None)
    tuned = "the whole model" if recipe.end is not None else tuned
    if tuned is not None:
        found = "tuning runs the text through every block, and facts hold none"
        raise SpecError(f"tuning {tuned} from facts", found, f"{TEXT}, or leave out the tuning")
    for decision in planned.decisions:
        _check_rewrites(decision, recipe)


def _check_rewrites(decision: Decision, recipe: Recipe) -> None:
    rule, site = decision.rule, decision.site
    if rule is None or site.block is None:
        return
    whole = recipe.model
    if whole is not None and (whole.learns or rule.needs != "nothing"):
        what = f"the grid of {rule.activation}" if rule.open_grid else f"method {rule.method}"
        asked = f"{whole.name} from facts" if whole.learns else f"{what} for {site.name} from facts"
        found = "facts are of the model as it is stored, " + (
            "and hold no text to learn from" if whole.learns else f"and {whole.name} changes what its layers see"
        )
        raise SpecError(asked, found, f"{TEXT}, or leave out {whole.name}")
    if rule.open_grid and rule.transforms:
        _check_grid(rule, site.name)


def _check_grid(rule: Rule, site: str) -> None:
    """Refuse a static grid behind transforms, but the extremes of inputs whose every channel is scaled alone."""
    grid, mixing = rule.input_format, [step.name for step in rule.transforms if step.row().mixes]
    assert isinstance(grid, Fixed)
    if grid.observer == EXTREMES and not mixing:
        return
    names = " and ".join(mixing or [step.name for step in rule.transforms])
    found = f"{names} rewrites its inputs, and facts hold " + (
        "nothing of what these mix to" if mixing else "histograms of what they were before, and extremes of channels"
    )
    less = f"int{grid.bits}/static/{'sym' if grid.symmetric else 'asym'}/{EXTREMES}"
    works = [TEXT, *([] if mixing else [f"{less} from these facts"]), f"int{grid.bits}/channel, which needs no range"]
    raise SpecError(f"the grid of {rule.activation} for {site} from facts", found, ", or ".join(works))


def read(
    facts: str | Path | None, checkpoint: Checkpoint, planned: Plan, named: Calibration | None = None
) -> KeptFacts | None:
    """The facts in the folder ``facts``, checked: of this model, of the text ``named`` if there is one, and all that
    the plan needs. None where no folder is given.

    Raises:
        InputError: they are not.
    """
    if facts is None:
        return None
    kept = KeptFacts.read(facts)
    kept.check(O.model_hashes(checkpoint), named.sha256 if named else None)
    for decision in planned.decisions:
        if decision.rule is not None and decision.site.block is not None:
            kept.require(decision.site.name, decision.rule.needs)
            kept.require(decision.site.name, decision.rule.row().needs)
            kept.require(decision.site.name, "ranges" if decision.rule.open_grid else "nothing")
            if decision.rule.open_grid and decision.rule.transforms:
                kept.ends(decision.site)
    return kept


def bound(planned: Plan, kept: KeptFacts) -> Plan:
    """``planned`` with the grids of inputs that ``kept`` fixes; those behind transforms follow from these, which are
    not known before the run."""
    return replace(planned, decisions=[_bound(decision, kept) for decision in planned.decisions])


def _bound(decision: Decision, kept: KeptFacts) -> Decision:
    rule, site = decision.rule, decision.site
    if rule is None or not rule.open_grid or rule.transforms or site.block is None:
        return decision
    grid = rule.input_format
    assert isinstance(grid, Fixed)
    return replace(decision, rule=replace(rule, activation=grid.observed(kept.ranges(site)).name))
