# SPDX-License-Identifier: Apache-2.0
"""Transform: which function-preserving rewrite to do first. One paper, one file; a transform never names a format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewbit.core.facts import Facts, Need
from fewbit.core.format import Format
from fewbit.core.rewrite import STEPS, Step
from fewbit.core.rows import Optioned


def _takes_all(columns: int) -> str | None:
    return None


@dataclass(frozen=True)
class Transform(Optioned):
    """One row of the transform table.

    * ``fit(weight, facts, seed, **options)``: a rewrite for one layer, from its float32 weight (rows, columns), the
      facts of its inputs, and a seed of its own (see :func:`seed_of`).
    * ``makes``: kind of the rewrite, so that its bytes are known before it is fitted.
    * ``needs``: "nothing" (data-free), "largest" (max|x| of every input) or "gram" (E[x x^T]).
    * ``rounds``: whether ``fit`` tries what rounding costs, and takes the layer's ``format`` after the seed.
    * ``options``: names and defaults; ``limits``: smallest and largest value of each.
    * ``refuse(columns)``: None, or the reason why inputs of that width cannot be rewritten.
    * ``powers(**options)``: what a run tries that can look at the output of the module around a layer: ``fit`` then
      takes the best as ``power``. Its option ``samples`` is the number of windows for that.
    """

    kind: ClassVar[str] = "transform"
    name: str
    fit: Callable[..., Step]
    makes: Literal["scale", "rotation", "hadamard"]
    needs: Need
    options: dict[str, float] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    refuse: Callable[[int], str | None] = _takes_all
    rounds: bool = False
    powers: Callable[..., tuple[float, ...]] | None = None
    source: str = ""

    def __call__(self, weight: Tensor, facts: Facts, seed: int, format: Format, **options: Any) -> Step:
        before = (weight, facts, seed, format) if self.rounds else (weight, facts, seed)
        return self.fit(*before, **self.filled(options))

    @property
    def mixes(self) -> bool:
        """Whether columns are mixed: then E[x^2] after it needs E[x x^T] before it, and max|x| is lost."""
        return STEPS[self.makes].mixes

    def tried(self, options: Mapping[str, Any]) -> tuple[float, ...]:
        """The powers to try at the output of the module around a layer; none where it has none, or none are wanted."""
        return () if self.powers is None else self.powers(**self.filled(options))


@dataclass(frozen=True)
class ModelTransform(Optioned):
    """One row of the table of what is done to a model as a whole before its layers: a rotation of its residual stream.

    * ``learns``: whether the rotation is learned, from text. ``options`` and ``limits``: as of :class:`Transform`.
    """

    kind: ClassVar[str] = "model transform"
    name: str
    options: dict[str, float]
    limits: dict[str, tuple[float, float]]
    learns: bool = False
    source: str = ""


def seed_of(seed: int, name: str) -> int:
    """The seed of the layer ``name`` in a run with ``seed``: 64 bits of a hash, so layers are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


def generator_of(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that begins with :func:`seed_of`, less its highest bit."""
    return torch.Generator(device).manual_seed(seed_of(seed, name) & (2**63 - 1))
