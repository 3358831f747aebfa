# SPDX-License-Identifier: Apache-2.0
"""Recipes: ordered rules from layer names to (transforms, format, method, options). TOML in and out.

::

    [[rule]]
    match = "re:.*\\.down_proj"      # the first rule that matches a layer decides
    format = "int8/g64"
    method = "rtn"

    [[rule]]
    match = "*"
    format = "int4/g128/asym"
    method = "gptq"
    options = { desc_act = true }
    transforms = ["rotate"]

``match`` is an exact name, a glob, ``re:`` and a regular expression (whole name), ``class:`` and a module class, or
``kind:`` and one of linear, experts, embedding, head. A glob never reaches the embedding or the head: name them or
their kind. ``format = "float"`` keeps a layer as it is. A scheme that names activations (``W8A8``) sets ``activation``
too: the format that a layer's inputs are rounded to, token by token, while it runs; or, as ``W8A8_STATIC`` does, one
grid for all tokens that an observer finds in calibration (``int8/static/asym/mse``, or ``.../percentile99.9``).
``transforms`` are done first, in order: names, or tables of a name and options, ``{ name = "smooth", alpha = 0.7 }``.
``tune``, written alike, is what the block learns once its layers are solved: ``["scales"]``. A rule that matches no
layer is an error. Above the rules, ``model = "quarot"``, or such a table, says what is done to the model as a whole
before, and ``end = "distill"`` what it learns as a whole in the end.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fewbit import formats, methods, transforms
from fewbit.core.facts import Need, strongest
from fewbit.core.rows import check_entry, inline
from fewbit.errors import InputError, SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FLOAT = "float"
_RULE = {"match": "*", "format": "int4/g64"}
_MORE = {"activation": "int8/channel", "method": "gptq", "options": {"desc_act": True}}
_LISTS = {"transforms": ["smooth"], "tune": ["scales"]}


C = TypeVar("C", bound="_Choice")


@dataclass(frozen=True)
class _Choice:
    """Abstract: a row of a table, with its options. Checked when built."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    what: ClassVar[str]
    example: ClassVar[str]

    def row(self) -> Any:
        """The row of that name, which knows its options."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        self.row().check(self.options)

    @classmethod
    def of(cls: type[C], entry: Any) -> C:
        """From a name, or a dict of ``name`` and options.

        Raises:
            SpecError: it is neither, or the row or an option does not exist.
        """
        if isinstance(entry, str):
            return cls(entry)
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            return cls(entry["name"], {key: value for key, value in entry.items() if key != "name"})
        raise SpecError(f"{cls.what} {entry!r}", "not a name", f"e.g. {cls.example}")

    def plain(self) -> str | dict[str, Any]:
        """What :meth:`of` reads."""
        return {"name": self.name, **self.options} if self.options else self.name


class Step(_Choice):
    """One transform of a rule, with its options."""

    what, example = "transform", '"smooth" or { name = "smooth", alpha = 0.7 }'

    def row(self) -> Any:
        return transforms.named(self.name)


class Tune(_Choice):
    """One tuning of a rule, with its options."""

    what, example = "tuning", '"scales" or { name = "scales", iters = 100 }'

    def row(self) -> Any:
        return methods.tuning(self.name)


class ModelStep(_Choice):
    """A transform of the whole model, with its options."""

    what, example = "model =", '"quarot" or { name = "quarot", heads = 0 }'

    def row(self) -> Any:
        return transforms.named_model(self.name)

    @property
    def learns(self) -> bool:
        """Whether text is needed for it."""
        return bool(transforms.named_model(self.name).learns)


class ModelTune(_Choice):
    """What the whole model learns in the end, with its options."""

    what, example = "end =", '"distill" or { name = "distill", iters = 400 }'

    def row(self) -> Any:
        return methods.model_tuning(self.name)


@dataclass(frozen=True)
class Rule:
    """One line of a recipe. Checked when built: an unknown format, method, transform or option never reaches a run."""

    match: str
    format: str
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)
    activation: str | None = None
    transforms: tuple[Step, ...] = ()
    tune: tuple[Tune, ...] = ()

    def __post_init__(self) -> None:
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise SpecError(f"rule match {self.match!r}", f"not a regular expression: {error}") from None
        if self.format == FLOAT:
            if self.transforms or self.tune:
                what = "transforms" if self.transforms else "tune"
                found = "a layer in float stays as it is, so there is nothing to do for it"
                raise SpecError(f"rule {self.match!r} with {what}", found, "give it a format")
            return
        if isinstance(formats.parse(self.format), (formats.Fixed, formats.Outliers)):
            works = f"{self.format} as the activation of a format such as int8/channel"
            raise SpecError(f"weights in {self.format}", "it is a format of activations", works)
        if self.activation is not None:
            formats.parse(self.activation)
        methods.named(self.method).check(self.options)
        mixing = ""
        for row in map(transforms.named, (step.name for step in self.transforms)):
            if mixing and row.needs != "nothing":
                found = f"after {mixing} the inputs are others than those that calibration sees"
                raise SpecError(f"transform {row.name} after {mixing}", found, f"put {row.name} first")
            mixing = row.name if row.mixes else mixing
        unknown = {
            "fisher": "the squared gradients of mixed weights do not follow from those of the weights",
            "largest": "max |x| of mixed inputs does not follow from what calibration sees",
        }.get(methods.named(self.method).needs)
        if mixing and unknown is not None:
            raise SpecError(
                f"method {self.method} after transform {mixing}", unknown, "smooth or awq, which only scale"
            )

    @cached_property
    def needs(self) -> Need:
        """What calibration has to collect at the inputs of a layer under this rule."""
        if self.format == FLOAT:
            return "nothing"
        method = strongest(methods.named(self.method).needs, "largest" if self.open_grid else "nothing")
        rows = [transforms.named(step.name) for step in self.transforms]
        # E[x'^2] of mixed inputs follows from E[x x^T] only
        asks = methods.named(self.method).needs != "nothing"
        mixed: Need = "gram" if asks and any(row.mixes for row in rows) else "nothing"
        return strongest(method, mixed, *(row.needs for row in rows))

    @cached_property
    def open_grid(self) -> bool:
        """Whether calibration is to fix the grid that inputs are rounded to."""
        grid = formats.parse(self.activation) if self.activation else None
        return isinstance(grid, formats.Fixed) and not grid.bound

    def tunings(self) -> tuple[Tune, ...]:
        """What its block learns once all its layers are solved, in order: what belongs to the method, then ``tune``."""
        if self.format == FLOAT:
            return ()
        own = methods.named(self.method).tuning
        return (*([Tune(own, self.options)] if own else []), *self.tune)

    @cached_property
    def calibrated(self) -> bool:
        """Whether anything in it looks at data."""
        return self.needs != "nothing" or bool(self.tunings())

    def matches(self, name: str, kind: str, module_class: str) -> bool:
        prefix, _, rest = self.match.partition(":")
        if prefix == "re" and rest:
            return re.fullmatch(rest, name) is not None
        if prefix == "class" and rest:
            return module_class == rest
        if prefix == "kind" and rest:
            return kind == rest
        if any(c in self.match for c in "*?["):
            return kind not in ("embedding", "head") and fnmatchcase(name, self.match)
        return name == self.match


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first that matches a layer decides. ``model``: what is done to the model before; ``end``: what
    it learns as a whole in the end."""

    rules: tuple[Rule, ...]
    model: ModelStep | None = None
    end: ModelTune | None = None

    @staticmethod
    def simple(
        format: str,
        method: str = "rtn",
        head: str = "int8/g64",
        options: dict[str, Any] | None = None,
        transforms: Sequence[str | dict[str, Any]] = (),
        tune: Sequence[str | dict[str, Any]] = (),
        activation: str | None = None,
    ) -> Recipe:
        """``transforms``, then one format and method for every layer, then ``tune``; embedding and head in ``head`` (or
        "float"). One of the transforms may be of the whole model, and the last of ``tune``. ``activation``: of inputs.

        Raises:
            SpecError: two of them are, what the whole model learns is not the last, or a scheme names activations too.
        """
        weight, own_activation = split_scheme(format)
        if activation is not None and own_activation is not None:
            found = f"the scheme rounds activations to {own_activation}"
            raise SpecError(f"activation {activation} of {format}", found, f"format {weight} with that activation")
        whole = [entry for entry in transforms if _of_model(entry)]
        if len(whole) > 1:
            raise SpecError(f"transforms {whole}", "each rotates the whole model", "one of them")
        own = tuple(Step.of(entry) for entry in transforms if not _of_model(entry))
        *blocks, last = tune or (None,)
        ends = _is_row(methods.MODEL_TUNINGS, last)
        if any(_is_row(methods.MODEL_TUNINGS, entry) for entry in blocks):
            raise SpecError(f"tune {list(tune)}", "the whole model learns once, after all blocks", "put it last")
        tunes = tuple(map(Tune.of, blocks if ends else tune))
        every = Rule("*", weight, method, dict(options or {}), activation or own_activation, own, tunes)
        rules = (Rule("kind:embedding", head), Rule("kind:head", head), every)
        return Recipe(rules, ModelStep.of(whole[0]) if whole else None, ModelTune.of(last) if ends else None)

    @property
    def learns(self) -> bool:
        """Whether the model as a whole needs text, for a rotation or in the end."""
        return self.end is not None or (self.model is not None and self.model.learns)

    @property
    def windows(self) -> int:
        """Windows that the whole model learns from, where the recipe says how many; else 0."""
        return 0 if self.end is None else int(self.end.options.get("windows", 0))

    def rule_for(self, name: str, kind: str, module_class: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(name, kind, module_class)), None)

    def check(self, layers: Sequence[tuple[str, str, str]]) -> None:
        """Every rule must match some (name, kind, class).

        Raises:
            InputError: there is no layer. SpecError: a rule matches nothing; the message shows what there is. The
                embedding and head rules that :meth:`simple` adds are exempt from a head tied to its embedding.
        """
        if not layers:
            raise InputError(
                "quantizing this model", "it has no layer of a kind that has a format", "linear layers, say"
            )
        for rule in self.rules:
            if rule.match.startswith("kind:") and rule.match[5:] in ("embedding", "head"):
                continue
            if not any(rule.matches(*layer) for layer in layers):
                which = {"kind": 1, "class": 2}.get(rule.match.partition(":")[0], 0)
                shown = ", ".join(list(dict.fromkeys(layer[which] for layer in layers))[: None if which else 3])
                works = f"{('layers are named like', 'kinds here are', 'classes here are')[which]} {shown}"
                raise SpecError(f"recipe rule {rule.match!r}", "it matches no layer", works)

    def to_dict(self) -> dict[str, Any]:
        return {**self._whole(), "rule": [_rule_dict(rule) for rule in self.rules]}

    def _whole(self) -> dict[str, Any]:
        """What is said above the rules."""
        found = {"model": self.model, "end": self.end}
        return {key: choice.plain() for key, choice in found.items() if choice is not None}

    def to_toml(self) -> str:
        lines = [f"{key} = {inline(value)}" for key, value in self._whole().items()]
        lines += [""] if lines else []
        for rule in self.to_dict()["rule"]:
            lines.append("[[rule]]")
            for key, value in rule.items():
                lines.append(f"{key} = {inline(value)}")
            lines.append("")
        return "\n".join(lines)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """Raises SpecError when a key is unknown or missing."""
        unknown = set(data) - {"rule", "model", "end"}
        if unknown or not isinstance(data.get("rule"), list) or not data["rule"]:
            raise SpecError(
                "recipe",
                f"unknown keys {sorted(unknown)}" if unknown else "it has no rules",
                "a recipe is a list of [[rule]]",
            )
        model = ModelStep.of(data["model"]) if "model" in data else None
        end = ModelTune.of(data["end"]) if "end" in data else None
        return Recipe(tuple(_rule(entry) for entry in data["rule"]), model, end)

    @staticmethod
    def read(path: str | Path) -> Recipe:
        """From a TOML file.

        Raises:
            InputError: the file cannot be read. SpecError: it is not TOML or not a recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {path}", f"it cannot be read ({error})", "a TOML file in UTF-8") from None
        try:
            return Recipe.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"recipe {path}", f"it is not TOML: {error}") from None


def split_scheme(format: str) -> tuple[str, str | None]:
    """A scheme such as ``W8A8`` as its weight format and activation format; any other format as it is, and None."""
    scheme = formats.SCHEMES.get(format.strip().upper())
    return (scheme.weight, scheme.activation) if scheme is not None else (format, None)


def _of_model(entry: Any) -> bool:
    return _is_row(transforms.MODEL_TRANSFORMS, entry)


def _is_row(rows: Sequence[Any], entry: Any) -> bool:
    """Whether ``entry``, a name or a table of one, names one of ``rows``."""
    name = entry.get("name") if isinstance(entry, dict) else entry
    return any(row.name == name for row in rows)


def _rule_dict(rule: Rule) -> dict[str, Any]:
    entry: dict[str, Any] = {"match": rule.match, "format": rule.format}
    if rule.activation is not None:
        entry["activation"] = rule.activation
    if rule.format != FLOAT:
        entry["method"] = rule.method
    if rule.options:
        entry["options"] = dict(rule.options)
    if rule.transforms:
        entry["transforms"] = [step.plain() for step in rule.transforms]
    if rule.tune:
        entry["tune"] = [tune.plain() for tune in rule.tune]
    return entry


def _rule(entry: Any) -> Rule:
    check_entry("recipe rule", entry, _RULE, _MORE | _LISTS)
    steps, tunes = entry.get("transforms", []), entry.get("tune", [])
    weight, activation = split_scheme(entry["format"])
    options = dict(entry.get("options", {}))
    return Rule(
        entry["match"],
        weight,
        entry.get("method", "rtn"),
        options,
        entry.get("activation", activation),
        tuple(map(Step.of, steps)),
        tuple(map(Tune.of, tunes)),
    )
