# SPDX-License-Identifier: Apache-2.0
"""Static activations: the grid of each layer's inputs, fixed by what calibration shows of them.

Once all layers of a block are solved, the calibration runs through it with their decoded weights and rewritten, but not
rounded, inputs; blocks before it are quantized already and round theirs. Where facts were collected beforehand, grids
are of what layers see in the float model. Behind a scale of every column their extremes are those of the inputs as they
were, scaled, which is all that ``minmax`` asks for; nothing else is known of rewritten inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from fewbit.core.observers import Seen
from fewbit.errors import of_layer
from fewbit.formats.fixed import Fixed
from fewbit.run.observe import Shared
from fewbit.run.rewriting import as_run
from fewbit.run.solve import Solved
from fewbit.run.state import Run


def fix_grids(run: Run, stage: int, index: int, solved: list[Solved]) -> list[Solved]:
    """``solved``, every layer's inputs on a grid that is known; the same where none is left open.

    Raises:
        InputError: inputs of a layer hold NaN or infinity; the message names it.
    """
    waiting: dict[str, Fixed] = {}
    for item in solved:
        grid = item.activation
        if isinstance(grid, Fixed) and not grid.bound:
            waiting[item.record["name"]] = grid
    if not waiting:
        return solved
    if run.kept is not None:
        known = {item.record["name"]: _kept(run, item, waiting) for item in solved if item.record["name"] in waiting}
    else:
        total = _watched(run, stage, index, solved, set(waiting))
        known = {name: grid.observed(total[name]) for name, grid in waiting.items()}
    return [_bound(item, known) for item in solved]


def _kept(run: Run, item: Solved, waiting: dict[str, Fixed]) -> Fixed:
    """The grid of the inputs of ``item`` by the facts of ``run``."""
    assert run.kept is not None
    site, grid = run.model.site(item.record["name"]), waiting[item.record["name"]]
    if not item.rewrite.steps:
        return grid.observed(run.kept.ranges(site))
    ends = item.rewrite.apply(run.kept.ends(site))
    return grid.at(float(ends[0].min()), float(ends[1].max()))


def _watched(run: Run, stage: int, index: int, solved: list[Solved], waiting: set[str]) -> dict[str, Seen]:
    """What the layers ``waiting`` see of the calibration."""
    total = {name: Seen.none() for name in waiting}
    source, shared, looked = run.hidden(stage - 1, "calibration"), run.inputs("calibration"), _Looked()

    def step(batch: int) -> dict[str, Seen]:
        with looked.batch() as found, run.arithmetic():
            run.model.run_block(index, source.read(batch), shared)
        return found

    # Hooks run in the order in which they were added: what is looked at was rewritten.
    with as_run(run.model, solved), run.model.observe(index, looked, waiting):
        for found in run.workers.map(step, range(len(run.texts.batches))):
            for name, seen in found.items():
                total[name] = total[name].merge(seen)
    source.close()
    return total


class _Looked:
    """A callback for ``StreamedModel.observe``: what each layer sees of the batch that the thread began."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def batch(self) -> Iterator[dict[str, Seen]]:
        self._local.found, self._local.seen = {}, Shared(Seen.of)
        yield self._local.found
        del self._local.seen

    def __call__(self, site: str, x: Tensor, expert: int | None) -> None:
        with of_layer(site):
            self._local.found[site] = self._local.seen.of(x)


def _bound(item: Solved, known: dict[str, Fixed]) -> Solved:
    grid = known.get(item.record["name"])
    return item if grid is None else replace(item, record={**item.record, "activation": grid.name})
