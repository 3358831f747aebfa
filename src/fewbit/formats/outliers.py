# SPDX-License-Identifier: Apache-2.0
"""Activations of which the large ones stay float: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), token by token.

``x = round(x where |x| < threshold) + (x where |x| >= threshold)``: the first part is rounded to integers with a scale
of its own, which no outlier stretches, the second multiplies the decoded weight in float.

Where it departs from the paper: there a column is float for all tokens of a batch as soon as one of them exceeds the
threshold, so what a token becomes depends on its company; here only the entries that exceed it are, and a token becomes
the same alone and in a batch. As in the authors' code (and unlike the paper's text) outliers meet the weight as it is
stored, in 8 bits: nothing is stored twice, and nothing needs calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from fewbit.core.format import Format, Param, Params
from fewbit.errors import UnsupportedError
from fewbit.formats.affine import Affine

THRESHOLD = 6.0
"""The paper's."""


@dataclass(frozen=True)
class Outliers(Format):
    """``int8/{g{N}|channel}/outliers{threshold}``: of activations only. Codes and parameters are of what is rounded."""

    inner: Affine
    threshold: float = THRESHOLD

    dim = 1

    @property
    def name(self) -> str:
        return f"{self.inner.name.removesuffix('/sym')}/outliers{self.threshold:g}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.inner.bits

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.inner.block

    @property
    def params(self) -> tuple[Param, ...]:
        return self.inner.params

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` as (what is rounded, what is not), each zero where the other is not. NaN is rounded, and so found."""
        large = torch.where(x.abs() >= self.threshold, x, 0.0)
        return torch.where(large != 0, 0.0, x), large

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        return self.inner.fit(self.split(blocks)[0], importance)

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        return self.inner.encode(self.split(blocks)[0], params)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.inner.decode(codes, params)

    def physical(self, params: Mapping[str, Tensor]) -> NoReturn:
        raise UnsupportedError(f"a weight in {self.name}", "it is a format of activations", "int8/channel/sym")
