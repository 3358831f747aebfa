# SPDX-License-Identifier: Apache-2.0
"""What a run would do, before it does it: every layer's format, method and kernel, exact sizes, estimated cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from fewbit import formats, kernels, methods
from fewbit.calibrate import Text
from fewbit.core import format as F
from fewbit.core import rewrite as R
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.qtensor import storage, storage_bytes
from fewbit.errors import SpecError, UnsupportedError, of_layer
from fewbit.model.checkpoint import Checkpoint
from fewbit.model.sites import SEEING, Site
from fewbit.model.stream import StreamedModel
from fewbit.recipe import FLOAT, ModelStep, ModelTune, Recipe, Rule, Step
from fewbit.run.effort import Time, estimate
from fewbit.run.solve import kernel_name, layout_for

REFERENCE = "reference"


@dataclass(frozen=True)
class Decision:
    """What happens to one site: a rule and what follows from it, or the reason why it stays as it is."""

    site: Site
    rule: Rule | None
    kernel: str
    nbytes: int
    reason: str = ""

    @property
    def weights(self) -> int:
        return self.site.parameters


@dataclass(frozen=True)
class Plan:
    """Sizes are exact bytes of tensors; ``peak_rss_bytes`` and ``seconds`` are estimates for this machine."""

    decisions: list[Decision]
    kept: list[tuple[str, str, int]]
    kept_dtype: torch.dtype
    size_bytes: int
    source_bytes: int
    bits_per_weight: float
    peak_rss_bytes: int
    time: Time
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def seconds(self) -> float:
        return self.time.here()

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """By name of the site; those that stay in float have none."""
        return {decision.site.name: decision.rule for decision in self.decisions if decision.rule is not None}

    def to_json(self) -> dict[str, Any]:
        layers = []
        for decision in self.decisions:
            rule = decision.rule
            layers.append(
                {
                    "name": decision.site.name,
                    "format": rule.format if rule else FLOAT,
                    "activation": rule.activation if rule else None,
                    "transforms": [step.plain() for step in rule.transforms] if rule else [],
                    "method": rule.method if rule else None,
                    "tune": [tune.plain() for tune in rule.tune] if rule else [],
                    "kernel": decision.kernel,
                    "reason_skipped": decision.reason or None,
                    "nbytes": decision.nbytes,
                }
            )
        return {
            "size_bytes": self.size_bytes,
            "source_bytes": self.source_bytes,
            "bits_per_weight": self.bits_per_weight,
            "peak_rss_bytes": self.peak_rss_bytes,
            "seconds": self.seconds,
            "layers": layers,
            "kept": [{"name": name, "reason": reason, "nbytes": size} for name, reason, size in self.kept],
            "warnings": self.warnings,
        }


def make_plan(checkpoint: Checkpoint, model: StreamedModel, recipe: Recipe, text: Text, force: bool) -> Plan:
    """Decide every site of ``model``; the calibration ``text`` only serves the estimates.

    Raises:
        SpecError: a rule matches nothing; or a data-free method below 3 bits without ``force``.
        UnsupportedError: a layout cannot hold a layer, or a transform or activation format cannot reach its inputs; the
            message names both.
    """
    named = [(site.name, site.kind, _module_class(model, site)) for site in model.sites]
    recipe.check(named)
    dtype = _kept_dtype(checkpoint, model)
    decisions = [
        _decide(site, _rule(model, site, recipe.rule_for(*entry), recipe.model), dtype, force)
        for site, entry in zip(model.sites, named, strict=True)
    ]
    kept = [(name, reason, model.module.get_parameter(name).numel() * dtype.itemsize) for name, reason in model.kept]
    quantized = [d for d in decisions if d.rule is not None]
    if not quantized:
        raise SpecError("quantizing", "every layer would stay in float", "give a rule with a format")
    _check_end(recipe.end, quantized)
    size = sum(d.nbytes for d in decisions) + sum(size for _, _, size in kept)
    bits = 8 * sum(d.nbytes for d in quantized) / sum(d.weights for d in quantized)
    calibrated = recipe.end is not None or any(d.rule and d.rule.calibrated for d in quantized)
    time, memory = estimate(decisions, text, calibrated, model, recipe)
    warnings = _left_out(model) + _warnings(quantized, size, checkpoint) + _of_surgery(model, decisions)
    return Plan(decisions, kept, dtype, size, checkpoint.nbytes, bits, memory, time, warnings)


def _kept_dtype(checkpoint: Checkpoint, model: StreamedModel) -> torch.dtype:
    """What stays in float is stored in: what the config names, or the files hold where that is narrower."""
    named: torch.dtype = model.config.dtype or torch.float32
    stored = checkpoint.dtype
    return stored if stored is not None and stored.itemsize < named.itemsize else named


def _rule(model: StreamedModel, site: Site, rule: Rule | None, whole: ModelStep | None) -> Rule | None:
    """``rule``, and after its own transforms the one that the rotation of the model, ``whole``, needs at this site."""
    online = model.surgery.online.get(site.name) if model.surgery else None
    if rule is None or rule.format == FLOAT or online is None:
        return rule
    if any(step.row().mixes for step in rule.transforms):
        return rule
    try:
        return replace(rule, transforms=(*rule.transforms, Step(online)))
    except SpecError as error:
        named = whole.name if whole else online
        asked = f"method {rule.method} of {site.name} after transform {named}, which is a {online} of its inputs"
        works = f"{named} with down=0 and output=0, which leaves these inputs alone"
        raise SpecError(asked, error.found, works) from None


def _of_surgery(model: StreamedModel, decisions: list[Decision]) -> list[str]:
    """What the user should know of a model that is rotated as a whole."""
    if model.surgery is None:
        return []
    apart = [d for d in decisions if d.site.name == model.surgery.untied]
    untied = [
        f"{d.site.name} was tied to the embedding and is stored apart from it, {d.nbytes} bytes more: "
        "a norm is folded into it"
        for d in apart
    ]
    return [*untied, *model.surgery.notes]


def _module_class(model: StreamedModel, site: Site) -> str:
    """Class of the module that owns the site's parameter."""
    return type(model.module.get_submodule(site.parameter.rpartition(".")[0])).__name__


def _decide(site: Site, rule: Rule | None, dtype: torch.dtype, force: bool) -> Decision:
    if rule is not None:
        check_transforms(site, rule)
    if site.tied_to is not None:
        return Decision(site, None, "", 0, f"tied to {site.tied_to}: one matrix is stored for both")
    if rule is None or rule.format == FLOAT:
        unnamed = f"{SEEING}, and no rule names it" if site.kind == "vision" else "no rule of the recipe matches it"
        reason = "the recipe keeps it in float" if rule else unnamed
        return Decision(site, None, "torch", site.parameters * dtype.itemsize, reason)
    _check_vision(site, rule)
    format = formats.parse(rule.format)
    grid = rule.input_format
    if site.kind == "head" and isinstance(grid, formats.Fixed) and not grid.bound:
        found = "calibration ends before the head, so nothing is known of its inputs"
        raise UnsupportedError(f"{grid.name} for {site.name}", found, f"int{grid.bits}/channel, found as they arrive")
    if rule.activation is not None and site.kind in ("experts", "embedding"):
        raise UnsupportedError(
            f"activations in {rule.activation} for {site.name}",
            f"inputs of {site.kind} are not rounded at run time",
            "give these layers a rule with a weight format alone, such as W8A16",
        )
    blind = rule.row().needs == "nothing" and not rule.tunings()
    if _width(format) < 3 and blind and not force:
        raise SpecError(
            f"{rule.format} by {rule.method} for {site.name}",
            "below 3 bits rounding without data destroys a model",
            "use --method gptq, or --force to do it anyway",
        )
    made, nbytes = made_of(site, rule, site.block is not None)
    _check_tunings(site, rule, format)
    with of_layer(site.name):
        kinds = [step.row().makes for step in rule.transforms]
        nbytes += storage_bytes(R.storage(kinds, site.shape[1]))
        nbytes += grid.nbytes if isinstance(grid, formats.Fixed) else 0
    sparse = made.sum and rule.row().parts is None
    return Decision(site, rule, kernel_name(rule, made.matrices, sparse), nbytes)


def made_of(site: Site, rule: Rule, seen: bool = True) -> tuple[Parts, int]:
    """What the method of ``rule`` makes of ``site``, and its bytes; one matrix where no token is ``seen``, as outside
    of blocks.

    Raises:
        SpecError, UnsupportedError: the method cannot, or no layout holds it; the message names the site.
    """
    format, method = formats.parse(rule.format), rule.row()
    if (refused := method.refuse(format)) is not None:
        able = ", ".join(row.name for row in methods.METHODS if row.refuse(format) is None)
        near = sorted(map(formats.parse, formats.EXAMPLES), key=lambda one: abs(_width(one) - _width(format)))
        takes = next((f"; {method.name} takes {one.name}" for one in near if method.refuse(one) is None), "")
        works = f"methods {able} take it{takes}"
        raise UnsupportedError(f"{rule.format} by {rule.method} for {site.name}", refused, works)
    if site.experts > 1 and not F.stackable(format, site.shape[0]):
        found = "what all its rows, or groups of them, share would have to differ between experts"
        works = "a format whose scales are per block, such as mxfp4 or int4/g64"
        raise UnsupportedError(f"{rule.format} for the fused experts {site.name}", found, works)
    with of_layer(site.name):
        made = method.made_of(format, site.shape, rule.options) if seen else Parts(((format, site.shape),), 0)
        nbytes = made.beside
        for part, (rows, columns) in made.matrices:
            nbytes += storage_bytes(storage(part, layout_for(part), (rows * site.experts, columns)))
    if made.sum:
        _check_terms(site, rule)
    return made, nbytes


def _check_terms(site: Site, rule: Rule) -> None:
    """Refuse layers whose weight cannot be a sum of terms."""
    asked = f"{rule.format} by {rule.method} for {site.name}, which makes a sum of terms of it"
    works = "give this layer a rule that makes one matrix: squeezellm and vptq do with outliers=0 (and sensitive=0, "
    works += 'norm="none"), laq with mean_bits=0'
    if site.experts > 1:
        raise UnsupportedError(asked, "fused experts are one matrix each", works)
    for tune in rule.tunings():
        if not tune.row().sums:
            format = formats.parse(rule.format)
            able = [row.name for row in methods.TUNINGS if row.sums and row.refuse(format) is None]
            found = f"{tune.name} tunes layers that are one matrix"
            raise UnsupportedError(asked, found, f"{' or '.join([*able, 'no tuning'])}; or {works}")
    if rule.activation is not None:
        apart = rule.row().parts is None
        missed = f"what is kept apart would miss the rounding to {rule.activation}"
        raise UnsupportedError(asked, missed if apart else "its parts would round their inputs each on its own", works)


def _check_vision(site: Site, rule: Rule) -> None:
    """Refuse what needs calibration for layers that see images: it is text, of which they are shown nothing."""
    if site.kind == "vision" and rule.calibrated:
        more = [step.name for step in (*rule.transforms, *rule.tunings())]
        inputs = f" with inputs in {rule.activation}" if rule.open_grid else ""
        asked = f"{rule.format} by {' and '.join([rule.method, *more])}{inputs} for {site.name}"
        works = "method rtn or hqq alone" + ", activations in int8/channel" * rule.open_grid
        works += ', or format "float", in a rule before with match = "kind:vision"'
        raise UnsupportedError(asked, "it is of what sees images, and calibration is text", works)


def _width(format: Format) -> float:
    """Bits of a code, a weight."""
    return format.bits / (format.dim * format.height)


def check_transforms(site: Site, rule: Rule) -> None:
    """Refuse transforms of inputs that nothing can rewrite when the model runs, or that nothing is known about."""
    for row in (step.row() for step in rule.transforms):
        works = "give this layer a rule without transforms, before the one that matches it now"
        if site.kind in ("experts", "embedding"):
            reason: str | None = f"inputs of {site.kind} are not rewritten at run time"
        elif site.tied_to is not None:
            reason = f"it shares its matrix with {site.tied_to}, whose inputs are not rewritten at run time"
        elif site.kind == "head" and row.needs != "nothing":
            reason, works = "calibration ends before the head, so nothing is known of its inputs", f"{works}, or rotate"
        else:
            reason, works = row.refuse(site.shape[1]), "leave the transform out for this layer"
        if reason is not None:
            raise UnsupportedError(f"transform {row.name} for {site.name}", reason, works)


def _check_tunings(site: Site, rule: Rule, format: Format) -> None:
    """Refuse tunings of layers that are in no block or that few tokens reach, and of formats with nothing to learn."""
    for tune in rule.tunings():
        works = "give this layer a rule without tuning, before the one that matches it now"
        if site.block is None:
            reason: str | None = "it is in no block, and tuning compares outputs of blocks"
        elif site.kind == "experts":
            reason = "experts see only the tokens that are routed to them"
        else:
            reason, works = tune.row().refuse(format), tunable(format)
        if reason is not None:
            raise UnsupportedError(f"tuning {tune.name} of {format.name} for {site.name}", reason, works)


def tunable(format: Format) -> str:
    """What would work where a tuning cannot learn anything of ``format``."""
    able = [row.name for row in methods.TUNINGS if row.refuse(format) is None]
    return f"{'tuning ' + ' or '.join(able) if able else 'no tuning takes it: leave it out'} for this layer"


def _check_end(end: ModelTune | None, quantized: list[Decision]) -> None:
    """Refuse what the whole model learns where no layer has anything to learn."""
    rows = [] if end is None else [methods.tuning(name) for name in end.row().by]
    inside = [d.rule for d in quantized if d.rule and d.site.block is not None and d.site.kind != "experts"]
    if end is not None and not any(row.refuse(formats.parse(rule.format)) is None for rule in inside for row in rows):
        asked = (
            f"{end.name} of a model whose blocks hold {', '.join(sorted({rule.format for rule in inside})) or FLOAT}"
        )
        raise UnsupportedError(
            asked, f"no layer has what {' or '.join(end.row().by)} learns", "int4/g64/asym has scales"
        )


def _left_out(model: StreamedModel) -> list[str]:
    """What the checkpoint holds and the result will not."""
    if not (names := model.unused):
        return []
    some = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return [f"{len(names)} tensors of the checkpoint have no place in {model.architecture} and are left out: {some}"]


def _warnings(quantized: list[Decision], size: int, checkpoint: Checkpoint) -> list[str]:
    found = []
    slow = [d for d in quantized if d.kernel.startswith(REFERENCE) and d.site.kind != "embedding"]
    if slow:
        rule = slow[0].rule
        assert rule is not None
        choice = kernels.choose(formats.parse(rule.format), slow[0].site.shape, activation=rule.input_format)
        why = "; ".join(f"{name}: {reason}" for name, reason in list(choice.reasons.items())[:2])
        found.append(
            f"{len(slow)} of {len(quantized)} layers have no fast kernel here and will NOT be faster than float, "
            f"e.g. {slow[0].site.name} ({why})"
        )
    if odd := [d for d in quantized if not _rounds_natively(d)]:
        found.append(
            f"inputs of {len(odd)} layers are rounded to {odd[0].rule.activation}, "  # type: ignore[union-attr]
            "which the native runtime does not do: transformers will run the model, more slowly; int8/channel is fast"
        )
    if size >= checkpoint.nbytes:
        found.append(f"the result ({size} bytes) is not smaller than the source ({checkpoint.nbytes} bytes)")
    return found


def _rounds_natively(decision: Decision) -> bool:
    """Whether the native runtime can round the layer's inputs: to integers, or, counting signs, in the kernel."""
    grid = decision.rule.input_format if decision.rule else None
    integers = isinstance(grid, formats.Affine) and grid.bits > 1 and not grid.whole
    return grid is None or integers or isinstance(grid, formats.Fixed | formats.Outliers) or "xnor" in decision.kernel
