# SPDX-License-Identifier: Apache-2.0
"""SqueezeLLM: levels put where the loss minds most, and the few weights that would spoil them kept apart in 16 bits.

``W_hat = table[code] + S``, S sparse: the outliers, and the most sensitive of the others, neither of which counts when
levels are fitted (Kim et al. 2023, arXiv:2306.07629). Outliers lie outside of ``[-T, T]`` with

::

    T = max(|Q1 - r IQR|, |Q3 + r IQR|)        Q1, Q3 the quartiles of the matrix, IQR = Q3 - Q1

and r such that their share is the one asked for: whatever the quartiles are, these are the entries of largest
magnitude. Where we depart from the authors' code:

* r is a matrix's own, so that each has the same share (they tune one r for the whole model): the size of the result
  follows from its shapes;
* k-means is exact (:mod:`fewbit.core.scalars`), not Lloyd's iterations from random starts;
* S holds what the nearest level leaves of a weight, not the weight: less is lost to rounding it;
* weights that are exactly zero count as any other: nothing marks them as removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import float16, given
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Dense, Sparse, Terms
from fewbit.errors import SpecError
from fewbit.methods import sensitive as S


@exact()
def squeezellm(
    weight: Tensor, format: Format, facts: Facts, *, outliers: float = 0.004, sensitive: float = 0.0005
) -> QTensor | Terms:
    """Quantize ``weight`` (rows, columns) to levels fitted under its Fisher diagonal, plus few entries in float16.

    Args:
        weight: float, (rows, columns).
        format: a palette; the paper's is one table a row (``palette3/row``).
        facts: with the Fisher diagonal, (rows, columns). Without any token all weights count alike.
        outliers: share of the entries, those of largest magnitude, that are kept apart.
        sensitive: share of the entries, those of largest Fisher diagonal among the others, that are kept apart.

    Returns:
        The dense and the sparse term; the matrix alone where no entry is kept apart.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, no Fisher diagonal).
        SpecError: the shares are no shares, or leave no entry to the palette.
        UnsupportedError: the levels of ``format`` are not clustered from the weights.
    """
    rows, columns = weight.shape
    most, next_most = counts((rows, columns), outliers, sensitive)
    worth = S.importance("squeezellm", weight, format, facts)
    if most + next_most == 0:
        return S.fitted(weight, format, worth)
    weight = weight.float()
    worth = torch.ones_like(weight) if worth is None else worth
    apart = largest(weight.abs(), most)
    apart |= largest(worth.masked_fill(apart, -1.0), next_most)
    dense = S.fitted(weight, format, worth.masked_fill(apart, 0.0))
    at, across = apart.nonzero(as_tuple=True)
    left = (weight - dense.dequantize())[at, across].clamp(-float16.LARGEST, float16.LARGEST)
    return Terms((rows, columns), (Dense(dense), Sparse.at((rows, columns), at, across, left)))


def counts(shape: tuple[int, int], outliers: float, sensitive: float) -> tuple[int, int]:
    """Entries of a matrix of that shape that are kept apart as outliers, and as sensitive.

    Raises:
        SpecError: the shares are no shares, or leave no entry to the palette.
    """
    for name, share in (("outliers", outliers), ("sensitive", sensitive)):
        if not (given.number(share) and 0 <= share <= 0.1):
            works = "a share of the entries from 0 to 0.1, e.g. 0.004"
            raise SpecError(f"squeezellm with {name}={share!r}", "out of range", works)
    entries = shape[0] * shape[1]
    return round(outliers * entries), round(sensitive * entries)


def beside(shape: tuple[int, int], *, outliers: float, sensitive: float) -> int:
    """Bytes stored beside the codes and tables: values, columns and row pointers."""
    entries = sum(counts(shape, outliers, sensitive))
    return Sparse.bytes_of(shape, entries) if entries else 0


def largest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of ``values`` (rows, columns) are; of equal ones the first. Boolean."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    edge = flat.topk(count).values[-1]
    above, ties = flat > edge, flat == edge
    spare = count - int(above.sum())
    return (above | (ties & (ties.cumsum(0) <= spare))).reshape(values.shape)
