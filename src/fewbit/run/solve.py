# SPDX-License-Identifier: Apache-2.0
"""One layer: float weight and facts in, packed bits and an honest record out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewbit import formats, kernels, layouts, methods
from fewbit.containers import terms as T
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.layout import UNPACKED, Layout
from fewbit.core.qtensor import QTensor, stack, sum_of_squares
from fewbit.core.reach import told_of
from fewbit.core.rewrite import Chain
from fewbit.core.room import times
from fewbit.core.terms import Terms, has_sparse, matrices, repack
from fewbit.core.transform import seed_of
from fewbit.errors import VerificationError, of_layer
from fewbit.formats.fixed import Fixed
from fewbit.model.sites import Site
from fewbit.recipe import Rule, Tune
from fewbit.run.spread import level_rounding, spread

K = TypeVar("K")


@dataclass(frozen=True)
class Around:
    """``module`` (a path), by whose output the ``power`` of a layer's transforms was chosen; None where that output is
    the layer's own, so that they choose it themselves."""

    module: str
    power: float | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """``weight`` float32 (experts * rows, columns); ``facts`` and ``seen`` (tokens, columns) one entry an expert.
    ``seed`` is that of the run; ``around`` None where no module around the layer was at hand, or was asked for."""

    site: Site
    rule: Rule
    format: Format
    weight: Tensor
    facts: list[Facts]
    seen: list[Tensor]
    seed: int
    around: Around | None = None

    @property
    def activation(self) -> Format | None:
        """The format that inputs are rounded to at run time."""
        return self.rule.input_format


@dataclass(frozen=True, eq=False)
class Solved:
    """``weight``, one matrix or a sum of terms, works on inputs that went through ``rewrite``. Where a tuning follows,
    ``task`` is what was solved and ``floating`` its float32 matrix for rewritten inputs."""

    weight: T.Weight
    record: dict[str, Any]
    rewrite: Chain
    task: Task | None = None
    floating: Tensor | None = None

    @property
    def tunings(self) -> tuple[Tune, ...]:
        """What its block learns after it was solved."""
        return self.task.rule.tunings() if self.task is not None else ()

    def unpacked(self) -> tuple[Tensor, T.Weight]:
        """The float weight, and what stands for it, as a tuning takes them."""
        assert self.floating is not None
        return self.floating, repack(self.weight, lambda format: UNPACKED)

    @cached_property
    def activation(self) -> Format | None:
        """The format that inputs are rounded to at run time."""
        spelt = self.record["activation"]
        return formats.parse(spelt) if spelt else None

    @property
    def qtensor(self) -> QTensor:
        """The weight, where it is one matrix."""
        assert isinstance(self.weight, QTensor)
        return self.weight

    @cached_property
    def integers(self) -> kernels.Prepared | None:
        """What rounds the inputs of this one matrix and multiplies integers, exactly; None where it would be floats, or
        levels of tables in fixed point, and where no calibration has fixed the grid of the inputs yet."""
        grid = self.activation
        if not isinstance(self.weight, QTensor) or self.record["kind"] == "experts":
            return None
        if grid is None or (isinstance(grid, Fixed) and not grid.bound):
            return None
        choice = kernels.choose(self.weight.format, self.weight.shape, activation=grid)
        return kernels.prepare(self.weight, activation=grid) if choice.kernel.family == "int8" else None

    @cached_property
    def rewriting(self) -> kernels.Rewriting:
        """What inputs go through before they are rounded, ready to run."""
        return kernels.Rewriting(self.rewrite)

    def arrays(self) -> dict[str, Tensor]:
        """What a file holds, by the name that follows the layer's."""
        stored = T.arrays(self.weight, T.describe(self.weight))
        found = {f"weight_{name}": tensor for name, tensor in stored.items()}
        return found | {f"input_{name}": tensor for name, tensor in self.rewrite.arrays.items()}


def layout_for(format: Format) -> Layout:
    """The layout that a file stores ``format`` in: the densest that takes it."""
    return layouts.named("trits" if format.levels == 3 else "dense")


def kernel_name(rule: Rule, matrices: Iterable[tuple[Format, tuple[int, int]]], sparse: bool) -> str:
    """What will run a layer under ``rule`` here that is made of ``matrices``, each a format and a shape; ``sparse``:
    with few entries beside them."""
    names = [kernels.choose(format, shape, activation=rule.input_format).name for format, shape in matrices]
    return " + ".join(dict.fromkeys([*names, *([kernels.choose_sparse().name] if sparse else [])]))


def fit(weight: Tensor, format: Format, facts: Facts, rule: Rule) -> tuple[T.Weight, bool]:
    """``weight`` (rows, columns) by the method of ``rule``, or rounded to nearest where that needs tokens and saw none;
    and whether it saw none."""
    method = rule.row()
    if method.needs != "nothing" and facts.tokens == 0:
        return methods.named("rtn")(weight, format, facts), True
    return method(weight, format, facts, **rule.options), False


def solve(task: Task) -> Solved:
    """Do the rule's transforms, choose codes with its method, pack, and measure the error of the outputs on ``seen``.

    Raises:
        FewbitError: what a transform or method refuses; the message names the layer.
    """
    with of_layer(task.site.name):
        return _solved(task)


def _solved(task: Task) -> Solved:
    began, site = time.monotonic(), task.site
    rewrite, rewritten, known = transformed(task)
    parts, starved, reach = [], [], []
    for expert, weight in enumerate(rewritten.split(site.shape[0]) if site.experts > 1 else [rewritten]):
        part, blind = fit(weight, task.format, known[expert], task.rule)
        parts.append(part)
        reach += [told_of(matrix, weight if matrix is part else None) for matrix in matrices(part)]
        starved += [expert] if blind else []
    made = _whole(parts)
    packed = repack(made, layout_for)
    plain = T.describe(packed)
    nbytes = packed.nbytes + rewrite.nbytes
    nbytes += task.activation.nbytes if isinstance(task.activation, Fixed) else 0
    record = {
        "name": site.name,
        "block": site.block,
        "kind": site.kind,
        "format": T.summary(plain),
        "activation": task.rule.activation,
        "layout": plain.get("layout"),
        "transforms": [step.plain() for step in task.rule.transforms],
        "rewrites": [
            {"kind": step.kind, "arrays": {name: digest(tensor) for name, tensor in step.arrays.items()}}
            for step in rewrite.steps
        ],
        "method": task.rule.method,
        "kernel": kernel_name(task.rule, [(task.format, site.shape)], False),
        "shape": list(site.shape),
        "experts": site.experts,
        "nbytes": nbytes,
        "bits_per_weight": 8 * nbytes / task.weight.numel(),
        "relative_error": relative_error(task, made, rewrite),
        "tokens": min(facts.tokens for facts in task.facts),
        "note": _note(starved, task, parts, reach),
        "seconds": round(time.monotonic() - began, 3),
    }
    if task.around is not None:
        record["around"] = asdict(task.around)
    if isinstance(packed, Terms):
        shapes = [(matrix.format, matrix.shape) for matrix in matrices(packed)]
        record |= {"terms": plain, "kernel": kernel_name(task.rule, shapes, has_sparse(packed))}
    if not task.rule.tunings():
        return Solved(packed, record, rewrite)
    told = {"tune": [tune.plain() for tune in task.rule.tune], "tuned": []}
    return Solved(packed, {**record, **told}, rewrite, task, rewritten)


def turns(tunings: Mapping[K, Sequence[Tune]]) -> Iterator[tuple[int, Tune, list[K]]]:
    """Who learns by what, in order: the first of ``tunings`` of all layers, then the second; equal ones at once. Each
    with its place among those of its layers."""
    for place in range(max(map(len, tunings.values()), default=0)):
        left = {key: own[place] for key, own in tunings.items() if place < len(own)}
        while left:
            tune = next(iter(left.values()))
            members = [key for key, own in left.items() if own == tune]
            yield place, tune, members
            left = {key: own for key, own in left.items() if own != tune}


def retuned(item: Solved, made: T.Weight | None, outcome: str) -> Solved:
    """``item`` with the codes and parameters of ``made``, or its own where tuning found none better; ``outcome`` is
    told in its record."""
    record = {**item.record, "tuned": [*item.record["tuned"], outcome]}
    if made is None:
        return replace(item, record=record)
    assert item.task is not None
    error = relative_error(item.task, made, item.rewrite)
    return replace(repacked(item, made), record={**record, "relative_error": error})


def repacked(item: Solved, made: T.Weight) -> Solved:
    """``item`` with the codes and parameters of the unpacked ``made``."""
    return replace(item, weight=repack(made, layout_for))


def _whole(parts: list[QTensor | Terms]) -> T.Weight:
    """The matrices of all experts as one; a sum of terms is of one matrix alone (the plan refuses others)."""
    matrices = [part for part in parts if isinstance(part, QTensor)]
    return stack(matrices) if matrices else parts[0]


def transformed(task: Task) -> tuple[Chain, Tensor, list[Facts]]:
    """The rule's rewrites, fitted one after the other, and the weight and facts for what comes out of them.

    Facts of rewritten inputs are worked out only where something still asks for them. (Fused experts have no
    transforms: the plan refuses them.)
    """
    if not task.rule.transforms:
        return Chain(), task.weight, task.facts
    rows = [step.row() for step in task.rule.transforms]
    weight, known, steps = task.weight, task.facts, []
    asking = [row.needs for row in rows[1:]] + [task.rule.row().needs]
    for i, row in enumerate(rows):
        seed = seed_of(task.seed, task.site.name) ^ i
        options = dict(task.rule.transforms[i].options)
        if row.powers is not None and task.around is not None and task.around.power is not None:
            options["power"] = task.around.power
        step = row(weight, known[0], seed, task.format, **options)
        steps.append(step)
        weight = step.weight(weight)
        if any(need != "nothing" for need in asking[i:]) and known[0].tokens:
            known = [step.facts(known[0])]
    return Chain(tuple(steps)), weight, known


def digest(values: Tensor) -> str:
    """SHA-256 of the bytes of ``values``, so that a file can be checked to hold exactly what was solved."""
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def relative_error(task: Task, made: T.Weight, rewrite: Chain) -> float:
    """|X (W - W')^T| / |X W^T| over the tokens seen; over the weights themselves where no token was seen.

    W' is what ``made``, which works on inputs that went through ``rewrite``, is on inputs as they are before.
    """
    if isinstance(made, QTensor) and not rewrite.steps and not any(len(x) for x in task.seen):
        lost, whole = made.lost or made.squares(task.weight)
    else:
        lost, whole = _squares(task, rewrite.unweight(made.dequantize()))
    return (lost / whole) ** 0.5 if whole else 0.0


def _squares(task: Task, effective: Tensor) -> tuple[float, float]:
    lost = whole = 0.0
    pairs = zip(task.weight.split(task.site.shape[0]), effective.split(task.site.shape[0]), task.seen, strict=True)
    for weight, quantized, x in pairs:
        lost += sum_of_squares(times(x, torch.sub, weight, quantized) if len(x) else weight - quantized)
        whole += sum_of_squares(x @ weight.T if len(x) else weight)
    return lost, whole


def check_outputs(
    weight: T.Weight,
    reference: Tensor,
    x: Tensor,
    name: str,
    activation: Format | None = None,
    prepared: kernels.Prepared | None = None,
) -> None:
    """The kernel that will run this layer computes ``x @ reference.T`` within the errors of float32 accumulation, of
    activations in fixed point and of levels as integers, x being rounded to ``activation`` first. ``prepared``: the
    weight ready to be run by it, where that is at hand.

    Raises:
        VerificationError: it does not.
    """
    weight = repack(weight, lambda format: UNPACKED)  # once for all that look at the codes
    got = (kernels.linear(x, weight, activation=activation) if prepared is None else prepared(x)).double()
    x = kernels.reference.round_activations(x, activation)
    expected = times(x.double(), torch.Tensor.double, reference)
    added = spread(weight, torch.cat([x.abs(), torch.ones_like(x[:1])]), reference).double()
    bound = (x.shape[1] + 64) * 2.0**-23 * added[:-1] + 2.0**-22 * x.abs().amax(1, keepdim=True) * added[-1] + 1e-30
    bound += level_rounding(weight, x.abs(), activation)
    worst = float(((got - expected).abs() / bound).max()) if got.numel() else 0.0
    if not worst <= 1.0:  # also catches NaN
        raise VerificationError(
            f"layer {name}", f"its kernel is {worst:.3g} times further from the reference than rounding explains"
        )


def _note(starved: list[int], task: Task, parts: list[T.Weight], reach: list[str]) -> str:
    """What a report should say of the layer: what few tokens or none, its method, or its scales could not do."""
    told = [_of_none(starved, task), *_of_few(task), _of_dead(task)]
    told += [matrix.note for part in parts for matrix in matrices(part)] + reach
    return "; ".join(dict.fromkeys(filter(None, told)))


def _of_few(task: Task) -> list[str]:
    """Where fewer tokens were seen than there are columns in a second moment, or codes in a grid to be fixed."""
    seen = [facts.tokens for facts in task.facts if facts.tokens]
    fewest, columns, grid = min(seen, default=0), task.site.shape[1], task.activation
    told = []
    if seen and task.rule.needs == "gram" and fewest < columns:
        told.append(f"second moment of {fewest} tokens for {columns} columns")
    if seen and isinstance(grid, Fixed) and not grid.bound and fewest < grid.levels:
        told.append(f"range of {fewest} tokens for {grid.levels} codes")
    return told


def _of_dead(task: Task) -> str:
    """Inputs that no token set: of their weights calibration says nothing."""
    zeros = [int((facts.total_square == 0).sum()) for facts in task.facts if facts.tokens]
    dead = max(zeros, default=0) if task.rule.needs != "nothing" else 0
    return f"{dead} of {task.site.shape[1]} inputs always zero" if dead else ""


def _of_none(starved: list[int], task: Task) -> str:
    site, method = task.site, task.rule.method
    if site.experts == 1 and not task.facts[0].tokens:
        idle = [step.name for step in task.rule.transforms if step.row().needs != "nothing"]
        parts = [f"{name} left the inputs as they are" for name in idle]
        parts += [f"rounded to nearest instead of {method}"] if starved else []
        return f"no calibration token reached it: {', '.join(parts)}" if parts else ""
    if not starved:
        alone = [step.name for step in task.rule.transforms if task.around is None and step.row().tried(step.options)]
        return f"{', '.join(alone)} by the layer's own output: no module around it was at hand" if alone else ""
    shown = ", ".join(str(expert) for expert in starved[:8]) + (", ..." if len(starved) > 8 else "")
    who = f"{len(starved)} of {site.experts} experts saw no calibration token ({shown})"
    return f"{who}: rounded to nearest instead of {method}"
