# SPDX-License-Identifier: Apache-2.0
"""Transforms and tunings as a recipe asks for them: a row of a table, with its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from fewbit import methods, transforms
from fewbit.core.rows import Optioned
from fewbit.core.transform import ModelTransform, Transform
from fewbit.core.tuning import ModelTuning, Tuning
from fewbit.errors import SpecError

C = TypeVar("C", bound="_Choice")


@dataclass(frozen=True)
class _Choice:
    """Abstract: a row of a table, with its options. Checked when built."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    what: ClassVar[str]
    example: ClassVar[str]

    def row(self) -> Optioned:
        """The row of that name, which knows its options."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        self.row().check(self.options)

    @property
    def settings(self) -> dict[str, Any]:
        """All options of the row: those given here, and the defaults of others."""
        return self.row().filled(self.options)

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

    def row(self) -> Transform:
        return transforms.named(self.name)


class Tune(_Choice):
    """One tuning of a rule, with its options."""

    what, example = "tuning", '"scales" or { name = "scales", iters = 100 }'

    def row(self) -> Tuning:
        return methods.tuning(self.name)


class ModelStep(_Choice):
    """A transform of the whole model, with its options."""

    what, example = "model =", '"quarot" or { name = "quarot", heads = 0 }'

    def row(self) -> ModelTransform:
        return transforms.named_model(self.name)

    @property
    def learns(self) -> bool:
        """Whether text is needed for it."""
        return self.row().learns


class ModelTune(_Choice):
    """What the whole model learns in the end, with its options."""

    what, example = "end =", '"distill" or { name = "distill", iters = 400 }'

    def row(self) -> ModelTuning:
        return methods.model_tuning(self.name)
