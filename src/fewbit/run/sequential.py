# SPDX-License-Identifier: Apache-2.0
"""The layers of one block solved on the calibration, and the calibration taken through the quantized block.

Group by group (GPTQ's "true sequential" order): the layers that share an input see what the layers before them,
quantized already, make of the calibration. Modules whose last layer is solved are stood in for by their stored output,
so that every layer multiplies each token once. A block that cannot be cut like that runs as a whole, twice: in float
for the facts of all its layers, and quantized for what the next block sees.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from torch import Tensor

from fewbit.core.facts import Accumulator, Facts
from fewbit.model.order import Order
from fewbit.model.replay import Call, calls_around, checked_order, output, replaying
from fewbit.run.around import choose, choose_in_whole
from fewbit.run.collect import calibration_through, collect
from fewbit.run.events import Event
from fewbit.run.hidden import HiddenBatches, HiddenFile, HiddenOnce
from fewbit.run.ranges import fix_grids
from fewbit.run.reconstruct import reference_on, tune_block, tuned
from fewbit.run.rewriting import as_run
from fewbit.run.solve import Solved
from fewbit.run.state import HELD, Run
from fewbit.run.tasks import block_sites, make_tasks, needs, solve_sites, solve_tasks

BY_GROUP = "group by group"


def quantize_block(
    run: Run, stage: int, index: int, sample: Tensor, seen: dict[str, list[Tensor]]
) -> tuple[list[Solved], str, HiddenFile | None]:
    """Solve every site of the loaded block ``index`` and put the decoded weights in place.

    ``sample`` (windows, tokens, width) is the probe before it; ``seen`` what the sites see of it. Returns what was
    solved, in the model's order, how the calibration ran, and its activations after ``stage``, to be committed, if
    anybody needs them.
    """
    sites, tunes = block_sites(run, index), tuned(run)
    if tunes:
        reference_on(run, stage, index)
    if run.texts.calibration is None or not set(needs(run, index).values()) - {"nothing"}:
        solved = fix_grids(run, stage, index, solve_sites(run, sites, {}, seen))
        solved = _tuned(run, stage, index, solved)
        return solved, "no data", pass_on(run, stage, index, solved)
    with run.arithmetic():
        order = checked_order(run.model, index, sample[:1], run.inputs("sample"))
    if isinstance(order, Order):
        solved, after = by_group(run, stage, index, order, seen)
        solved = sorted(solved, key=_place(run))
        if after is None:
            solved = _tuned(run, stage, index, solved)
            after = pass_on(run, stage, index, solved)
        return solved, BY_GROUP, after
    before = run.journal.stages[-1].get("order", BY_GROUP)
    if before == BY_GROUP:
        run.progress(Event("note", message=f"{run.model.blocks[index]} runs as a whole, twice: {order}"))
    tasks = choose_in_whole(run, stage, index, make_tasks(run, sites, collect(run, stage, index), seen), sample)
    solved = fix_grids(run, stage, index, solve_tasks(run, tasks))
    solved = _tuned(run, stage, index, solved)
    return solved, f"as a whole, twice: {order}", pass_on(run, stage, index, solved)


def _tuned(run: Run, stage: int, index: int, solved: list[Solved]) -> list[Solved]:
    return tune_block(run, stage, index, solved) if any(item.tunings for item in solved) else solved


def pass_on(run: Run, stage: int, index: int, solved: list[Solved]) -> HiddenFile | None:
    """Take the calibration, where there is one, through the quantized block ``index``, if a block follows."""
    if run.texts.calibration is None or _is_last(run, stage):
        return None
    return calibration_through(run, stage, index, "calibration", "calibration", solved)


def _is_last(run: Run, stage: int) -> bool:
    """Whether no block follows: nothing behind the blocks is solved on the calibration."""
    return stage == run.stages - 2


def by_group(
    run: Run, stage: int, index: int, order: Order, seen: dict[str, list[Tensor]]
) -> tuple[list[Solved], HiddenFile | None]:
    """The block group by group, each with the facts of what the quantized groups before it make; and the calibration
    after it, unless the block is going to be tuned, or is the last."""
    asked, solved = needs(run, index), list[Solved]()
    by_name = {site.name: site for site in block_sites(run, index)}
    with Passes(run, stage, index, order) as passes:
        with ExitStack() as running:
            for group, names in enumerate(order.groups):
                wanted = [asked[name] for name in names if asked.get(name, "nothing") != "nothing"]
                facts: dict[str, list[Facts]] = {}
                total = passes.collect(group, bool(wanted), "gram" in wanted)
                if total is not None:
                    bare = replace(total, gram=None)
                    facts = {name: [total if asked.get(name) == "gram" else bare] for name in names}
                tasks = make_tasks(run, [by_name[name] for name in names], facts, seen)
                if total is not None:
                    tasks = choose(run, tasks, order.same_output(group), partial(passes.around, group))
                made = solve_tasks(run, tasks)
                running.enter_context(as_run(run.model, made))
                solved += made
        solved = fix_grids(run, stage, index, solved)
        if _is_last(run, stage) or any(item.tunings for item in solved):
            return solved, None
        with as_run(run.model, solved):
            return solved, passes.finish()


class Passes:
    """The calibration's passes through one block, and what is kept between them, which goes with it."""

    def __init__(self, run: Run, stage: int, index: int, order: Order) -> None:
        self._run, self._stage, self._index, self._order = run, stage, index, order
        file = run.hidden(stage - 1, "calibration")  # read again for every group
        self._source = HiddenOnce(file) if order.groups and file.nbytes <= HELD else file
        self._inputs: dict[str, HiddenFile | HiddenBatches] = {}
        self._outputs: dict[str, HiddenFile | HiddenBatches] = {}
        self._seen: dict[tuple[int, int], Tensor] = {}  # by group and batch, until the pass behind it takes them

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._source, *self._inputs.values(), *self._outputs.values()):
            file.close()

    def collect(self, group: int, wanted: bool, gram: bool) -> Facts | None:
        """Facts of the inputs of ``group``, where ``wanted``; keeps those inputs where a module is closed with it."""
        run, shared = self._run, self._run.inputs("calibration")
        closing = next((closing for closing in self._order.closings if closing.group == group), None)
        if closing is None and not wanted:
            return None
        self._prepare(group)
        keep = None if closing is None else run.scratch(f"inputs-{group}", closing.inputs.width, closing.inputs.dtype)

        def one(batch: int) -> Accumulator | None:
            hidden = self._source.read(batch)
            with run.arithmetic():
                x = step(hidden, shared, self._made(group, batch))
            if closing is not None and keep is not None:
                keep.write(batch, closing.inputs.stored(x, hidden))
            if self._order.giver(group + 1) and x.nbytes * len(run.texts.batches) <= HELD:
                self._seen[group, batch] = x
            return Accumulator.of(x, gram) if wanted else None

        total: Accumulator | None = None
        with replaying(run.model, self._index, self._order, group) as step:
            for found in run.workers.map(one, range(len(run.texts.batches))):
                total = found if total is None or found is None else total.join(found)
        self._settle()
        if closing is not None and keep is not None:
            self._inputs[closing.module] = keep
        return None if total is None else total.facts()

    def around(self, group: int, windows: int) -> tuple[str, list[Call]]:
        """The smallest module that is called with the layers of ``group`` in it, by its path, and what it is called
        with for the first ``windows`` windows of the calibration, in whole batches; after :meth:`collect` of it."""
        run, shared, calls = self._run, self._run.inputs("calibration"), list[Call]()
        batches = min(-(-windows // run.texts.batch), len(run.texts.batches))
        with calls_around(run.model, self._index, self._order, group) as called:
            for batch in range(batches):
                with run.arithmetic():
                    module, call = called(self._source.read(batch), shared, self._made(group, batch))
                calls.append(call)
        return module, calls

    def finish(self) -> HiddenFile:
        """What the block makes of the calibration, all its groups being solved; to be committed."""
        run, shared, last = self._run, self._run.inputs("calibration"), len(self._order.groups)
        target = run.hidden(self._stage, "calibration", create=True)

        def one(batch: int) -> None:
            hidden = self._source.read(batch)
            with run.arithmetic():
                made = step(hidden, shared, self._made(last, batch))
                target.write(batch, run.model.finite(self._index, hidden, shared, made))

        with replaying(run.model, self._index, self._order, last) as step:
            for _ in run.workers.map(one, range(len(run.texts.batches))):
                pass
        return target

    def _prepare(self, group: int) -> None:
        """Room for the outputs that a pass makes for the first time: in place of the inputs, where they are as wide."""
        for closing in self._order.closed(group):
            if (inputs := self._inputs.get(closing.module)) is not None:
                width, dtype = closing.outputs.width, closing.outputs.dtype
                same = (closing.inputs.width, closing.inputs.dtype) == (width, dtype)
                self._outputs[closing.module] = (
                    inputs if same else self._run.scratch(f"outputs-{closing.group}", width, dtype)
                )

    def _made(self, group: int, batch: int) -> dict[str, Tensor]:
        """Outputs of the closed modules for a batch: those of modules just closed from their last layer's inputs."""
        made = {}
        if (seen := self._seen.pop((group - 1, batch), None)) is not None:
            made[self._order.giver(group)] = seen
        for closing in self._order.closed(group):
            module = closing.module
            if module not in self._inputs:
                made[module] = self._outputs[module].read(batch)
                continue
            made[module] = output(self._run.model, closing, self._inputs[module].read(batch))
            if module in self._outputs:
                self._outputs[module].write(batch, made[module])
        return made

    def _settle(self) -> None:
        """Drop the inputs of modules whose outputs are stored now."""
        for module in self._outputs.keys() & self._inputs.keys():
            if (inputs := self._inputs.pop(module)) is not self._outputs[module]:
                inputs.close()


def _place(run: Run) -> Callable[[Solved], int]:
    """Sorts by the model's own order."""
    places = {site.name: place for place, site in enumerate(run.model.sites)}
    return lambda item: places[item.record["name"]]
