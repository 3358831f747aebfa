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
``kind:`` and one of linear, experts, embedding, head, vision. A glob never reaches the embedding or the head: name them
or their kind. ``vision`` are the linear layers of a vision-language model's tower and projector, which stay in float
unless a rule names them: their kind, a name, a regular expression, or a glob that begins with where they are
(``model.vision_tower.*``).

``format = "float"`` keeps a layer as it is. A scheme that names activations (``W8A8``) sets ``activation`` too: the
format that a layer's inputs are rounded to, token by token, while it runs; or, as ``W8A8_STATIC`` does, one grid for
all tokens that an observer finds in calibration (``int8/static/asym/mse``, or ``.../percentile99.9``).
``transforms`` are done first, in order: names, or tables of a name and options, ``{ name = "smooth", alpha = 0.7 }``.
``tune``, written alike, is what the block learns once its layers are solved: ``["scales"]``. A rule that matches no
layer is an error. Above the rules, ``model = "quarot"``, or such a table, says what is done to the model as a whole
before, and ``end = "distill"`` what it learns as a whole in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit import methods, transforms
from fewbit.core.rows import inline
from fewbit.errors import InputError, SpecError
from fewbit.recipe.choices import ModelStep, ModelTune, Step, Tune
from fewbit.recipe.rules import FLOAT, Rule, split_scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["FLOAT", "ModelStep", "ModelTune", "Recipe", "Rule", "Step", "Tune", "split_scheme"]


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
        return {**self._whole(), "rule": [rule.plain() for rule in self.rules]}

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
        return Recipe(tuple(map(Rule.of, data["rule"])), model, end)

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


def _of_model(entry: Any) -> bool:
    return _is_row(transforms.MODEL_TRANSFORMS, entry)


def _is_row(rows: Sequence[Any], entry: Any) -> bool:
    """Whether ``entry``, a name or a table of one, names one of ``rows``."""
    name = entry.get("name") if isinstance(entry, dict) else entry
    return any(row.name == name for row in rows)
