# SPDX-License-Identifier: Apache-2.0
"""One line of a recipe: which layers, and what is done to them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from fewbit import formats, methods
from fewbit.core.facts import Need, strongest
from fewbit.core.format import Format
from fewbit.core.method import Method
from fewbit.core.rows import check_entry
from fewbit.errors import SpecError
from fewbit.recipe.choices import Step, Tune

FLOAT = "float"
_RULE = {"match": "*", "format": "int4/g64"}
_MORE = {"activation": "int8/channel", "method": "gptq", "options": {"desc_act": True}}
_LISTS = {"transforms": ["smooth"], "tune": ["scales"]}


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
        self.row().check(self.options)
        mixing = ""
        for row in (step.row() for step in self.transforms):
            if mixing and row.needs != "nothing":
                found = f"after {mixing} the inputs are others than those that calibration sees"
                raise SpecError(f"transform {row.name} after {mixing}", found, f"put {row.name} first")
            mixing = row.name if row.mixes else mixing
        unknown = {
            "fisher": "the squared gradients of mixed weights do not follow from those of the weights",
            "largest": "max |x| of mixed inputs does not follow from what calibration sees",
        }.get(self.row().needs)
        if mixing and unknown is not None:
            raise SpecError(
                f"method {self.method} after transform {mixing}", unknown, "smooth or awq, which only scale"
            )

    def row(self) -> Method:
        """The row of the method, which knows its options."""
        return methods.named(self.method)

    @cached_property
    def needs(self) -> Need:
        """What calibration has to collect at the inputs of a layer under this rule."""
        if self.format == FLOAT:
            return "nothing"
        method, rows = self.row(), [step.row() for step in self.transforms]
        # E[x'^2] of mixed inputs follows from E[x x^T] only
        mixed: Need = "gram" if method.needs != "nothing" and any(row.mixes for row in rows) else "nothing"
        return strongest(method.needs, "largest" if self.open_grid else "nothing", mixed, *(row.needs for row in rows))

    @property
    def input_format(self) -> Format | None:
        """The format that inputs are rounded to; None where they stay float."""
        return formats.parse(self.activation) if self.activation else None

    @cached_property
    def open_grid(self) -> bool:
        """Whether calibration is to fix the grid that inputs are rounded to."""
        grid = self.input_format
        return isinstance(grid, formats.Fixed) and not grid.bound

    def tunings(self) -> tuple[Tune, ...]:
        """What its block learns once all its layers are solved, in order: what belongs to the method, then ``tune``."""
        if self.format == FLOAT:
            return ()
        own = self.row().tuning
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
            return kind != "vision" and module_class == rest
        if prefix == "kind" and rest:
            return kind == rest
        if any(c in self.match for c in "*?["):
            named = kind != "vision" or re.split(r"[*?[]", self.match)[0].count(".") > 1
            return named and kind not in ("embedding", "head") and fnmatchcase(name, self.match)
        return name == self.match

    @staticmethod
    def of(entry: Any) -> Rule:
        """From an entry of a recipe's file, whose format may be a scheme.

        Raises:
            SpecError: it is none, or names what does not exist.
        """
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

    def plain(self) -> dict[str, Any]:
        """What :meth:`of` reads."""
        entry: dict[str, Any] = {"match": self.match, "format": self.format}
        if self.activation is not None:
            entry["activation"] = self.activation
        if self.format != FLOAT:
            entry["method"] = self.method
        if self.options:
            entry["options"] = dict(self.options)
        if self.transforms:
            entry["transforms"] = [step.plain() for step in self.transforms]
        if self.tune:
            entry["tune"] = [tune.plain() for tune in self.tune]
        return entry


def split_scheme(format: str) -> tuple[str, str | None]:
    """A scheme such as ``W8A8`` as its weight format and activation format; any other format as it is, and None."""
    scheme = formats.SCHEMES.get(format.strip().upper())
    return (scheme.weight, scheme.activation) if scheme is not None else (format, None)
