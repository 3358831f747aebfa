# SPDX-License-Identifier: Apache-2.0
"""Tuning: what the layers of a block learn together, after a method has chosen their codes.

The block with its quantized layers is compared with the float block at its output, and what a layer may still change
follows the gradient of that. A tuning knows one layer: which numbers can be learned, which weight they stand for, how a
gradient of the weight reaches them. It knows no block, no loss and no data; :mod:`fewbit.run.reconstruct` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fewbit.core.descent import Rule
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.rows import Optioned
from fewbit.core.terms import Terms

Values = Mapping[str, Tensor]
"""Float32 arrays by name: what is learned."""


class Learnable(ABC):
    """One layer while its block is tuned.

    ``start``: values to begin with. ``bounds``: least and greatest entry of each.
    """

    start: Values
    bounds: Mapping[str, tuple[float, float]]

    @abstractmethod
    def weight(self, values: Values) -> Tensor:
        """The float32 (rows, columns) matrix that :meth:`freeze` decodes to, bit for bit: nothing is relaxed."""

    @abstractmethod
    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        """From ``grad`` (rows, columns) of the weight, that of every value; straight through what is rounded."""

    @abstractmethod
    def freeze(self, values: Values) -> QTensor | Terms:
        """Codes and parameters, unpacked."""


@dataclass(frozen=True)
class Tuning(Optioned):
    """One row of the table of tunings.

    * ``learn(weight, made)``: what of the unpacked ``made`` can be learned, ``weight`` float32 (rows, columns) being
      what it stands for. ``sums``: whether that may be a sum of terms.
    * ``descend``: makes a fresh rule of descent for one layer.
    * ``options``: names and defaults; ``limits``: smallest and largest value of each. ``iters`` steps of ``batch``
      windows; ``lr`` falls linearly to zero, 0 meaning ``rate(iters, format)``; ``relative``, ``cosine``, ``own``: see
      :mod:`fewbit.run.reconstruct`.
    * ``refuse(format)``: None, or the reason why it can learn nothing of that format.
    * ``inputs``: whether the ends of static grids of inputs are learned along, where :mod:`fewbit.network` runs it.
    """

    kind: ClassVar[str] = "tuning"
    name: str
    learn: Callable[[Tensor, Any], Learnable]
    descend: Callable[[], Rule]
    rate: Callable[[int, Format], float]
    refuse: Callable[[Format], str | None]
    options: dict[str, float] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    inputs: bool = False
    sums: bool = False
    source: str = ""


@dataclass(frozen=True)
class ModelTuning(Optioned):
    """One row of the table of what a model learns as a whole, once all its blocks are done.

    * ``by``: tunings by name, and the rate of the first step. A layer learns what the first of them that takes its
      format does; where none takes it, it stands still.
    * ``options`` and ``limits``: as of :class:`Tuning`. ``iters`` steps of ``batch`` windows; ``lr`` falls linearly to
      zero, 0 meaning the rates of ``by``; ``vectors``, ``label``: see :mod:`fewbit.run.whole`; ``windows`` of the text
      are drawn for it, if they are more than blocks are calibrated on.
    """

    kind: ClassVar[str] = "model tuning"
    name: str
    by: Mapping[str, float]
    options: dict[str, float]
    limits: dict[str, tuple[float, float]]
    source: str = ""
