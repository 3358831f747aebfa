# SPDX-License-Identifier: Apache-2.0
"""Sensitive k-means: levels of a palette put where the loss minds most.

The levels of every table are those of least ``sum_ij F_ij (w_ij - w_hat_ij)^2``, F the Fisher diagonal, by exact
weighted k-means (:mod:`fewbit.core.scalars`). It is the objective of SqueezeLLM (Kim et al. 2023, arXiv:2306.07629),
whose code clusters with Lloyd's iterations from random starts; coremltools calls it sensitive k-means. Any palette: one
table a tensor, a group of rows or a row, with or without scales.

Vectors down columns (``vector4x8``) too: seeded k-means++ and Lloyd's iterations, each vector weighing as much as its
weights do on average, and then the nearest vector, as coremltools has it for clusters of several channels.
"""

from __future__ import annotations

from torch import Tensor

from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.methods import sensitive


@exact()
def skm(weight: Tensor, format: Format, facts: Facts) -> QTensor:
    """Quantize ``weight`` (rows, columns) to the nearest of levels fitted under its Fisher diagonal.

    Args:
        weight: float, (rows, columns).
        format: a palette, or vectors of a codebook.
        facts: with the Fisher diagonal, (rows, columns). Without any token all weights count alike.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no Fisher diagonal).
        UnsupportedError: the levels of ``format`` are not clustered from the weights.
    """
    return sensitive.fitted(weight, format, sensitive.importance("skm", weight, format, facts, vectors=True))


def refuse(format: Format) -> str | None:
    """None, or why nothing of ``format`` is clustered from the weights."""
    return sensitive.refuse(format, vectors=True)
