# SPDX-License-Identifier: Apache-2.0
"""Method: which codes to choose. One paper, one file; a method never names a format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewbit.core.facts import Facts, Need
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor


def _takes_all(format: Format) -> str | None:
    return None


@dataclass(frozen=True)
class Method:
    """One row of the method table.

    ``solve(weight, format, facts, **options)`` takes a float32 (rows, columns) weight and returns an unpacked QTensor.
    ``needs``: "nothing" (data-free), "mean_square" (E[x^2]) or "gram" (E[x x^T]).
    ``options``: names and defaults, so that a recipe can be checked before work starts.
    ``tuning``: name of the tuning that follows it and takes its options, "" for none.
    ``refuse(format)``: None, or the reason why it cannot choose codes of that format; the plan asks it.
    """

    name: str
    solve: Callable[..., QTensor]
    needs: Need
    options: dict[str, Any] = field(default_factory=dict)
    refuse: Callable[[Format], str | None] = _takes_all
    tuning: str = ""
    source: str = ""

    def __call__(self, weight: Tensor, format: Format, facts: Facts, **options: Any) -> QTensor:
        return self.solve(weight, format, facts, **{**self.options, **options})
