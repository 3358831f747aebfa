# SPDX-License-Identifier: Apache-2.0
"""Method: which codes to choose. One paper, one file; a method never names a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fewbit.core.facts import Facts, Need
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.rows import Optioned
from fewbit.core.terms import Terms


def _takes_all(format: Format) -> str | None:
    return None


def _nothing_beside(shape: tuple[int, int], **options: Any) -> int:
    return 0


def _agrees(format: Format, columns: int, **options: Any) -> None:
    pass


@dataclass(frozen=True)
class Parts:
    """What the result for a weight is made of: ``matrices``, each a format and (rows, columns); and ``beside``, the
    bytes of everything else."""

    matrices: tuple[tuple[Format, tuple[int, int]], ...]
    beside: int

    @property
    def sum(self) -> bool:
        """Whether it is a sum of terms, not one matrix."""
        return self.beside > 0 or len(self.matrices) > 1


@dataclass(frozen=True)
class Method(Optioned):
    """One row of the method table.

    ``solve(weight, format, facts, **options)`` takes a float32 (rows, columns) weight and returns an unpacked QTensor,
    or a sum of terms whose matrices are unpacked. Where the QTensor says what was ``lost``, it is of that weight.
    ``needs``: "nothing" (data-free), "mean_square" (E[x^2]), "fisher" (Fisher diagonal) or "gram" (E[x x^T]).
    ``options``: names and defaults; ``limits``: smallest and largest value of each number, so that a recipe can be
    checked before work starts.
    ``tuning``: name of the tuning that follows it and takes its options, "" for none.
    ``refuse(format)``: None, or the reason why it cannot choose codes of that format; the plan asks it.
    ``agrees(format, columns, **options)``: raises SpecError where the options contradict one another for rows of so
    many columns in that format; the plan asks it.
    ``beside(shape, **options)``: bytes that the result for a (rows, columns) weight takes beside one matrix in the
    format; where there are any, it is a sum of terms. ``parts(format, shape, **options)``: the same of results that are
    made of other matrices than one in the format.
    ``work``: about how many operations of a matrix product choosing the codes of one weight takes as long as, for the
    estimate before a run; measured.
    """

    kind: ClassVar[str] = "method"
    name: str
    solve: Callable[..., QTensor | Terms]
    needs: Need
    options: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    refuse: Callable[[Format], str | None] = _takes_all
    agrees: Callable[..., None] = _agrees
    beside: Callable[..., int] = _nothing_beside
    parts: Callable[..., Parts] | None = None
    tuning: str = ""
    work: float = 0.0
    source: str = ""

    def __call__(self, weight: Tensor, format: Format, facts: Facts, **options: Any) -> QTensor | Terms:
        return self.solve(weight, format, facts, **self.filled(options))

    def made_of(self, format: Format, shape: tuple[int, int], options: Mapping[str, Any]) -> Parts:
        """What the result for a weight of ``shape`` (rows, columns) will be made of.

        Raises:
            SpecError: the options contradict one another, or the shape. UnsupportedError: or the format.
        """
        options = self.filled(options)
        self.agrees(format, shape[1], **options)
        if self.parts is not None:
            return self.parts(format, shape, **options)
        return Parts(((format, shape),), self.beside(shape, **options))
