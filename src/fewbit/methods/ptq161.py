# SPDX-License-Identifier: Apache-2.0
"""PTQ1.61: few columns, those of the largest inputs, in four bits, and one bit for all others.

Zhao et al. 2025, arXiv:2502.13179: a mask of one bit an input channel takes the fifth of the columns whose inputs have
the largest ``max|x|``. These are rounded to nearest in 4 bits; of the others, with mu the mean of the row over them::

    W_hat = (alpha sign(W - mu) + mu) (r1 r2^T)

alpha, r1 and r2 are learned block by block after that: the tuning ``scales`` does it (``cosine=1``, ``own=1`` are the
paper's loss). r1 needs no room: ``alpha r1`` and ``mu r1`` are the scale and offset of a row of two values, and r2 is a
column scale. The mask is stored as the order of the columns, the salient ones first, so that both parts are
contiguous. Where we depart from the authors' code:

* alpha starts as mean ``|W - mu|``, which loses least (theirs: mean ``|W|``), and mu is learned with it;
* the range of the salient columns is theirs alone, not that of the whole row;
* ties at the threshold do not make the mask larger: the size of the result follows from its shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import given
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Term, Terms, foremost, index_dtype
from fewbit.errors import InputError, SpecError, UnsupportedError
from fewbit.methods import objective


@exact()
def ptq161(weight: Tensor, format: Format, facts: Facts, *, salient: float = 0.2, salient_bits: int = 4) -> Terms:
    """Quantize ``weight`` (rows, columns), its salient columns in ``salient_bits`` and the others in one.

    Args:
        weight: float, (rows, columns).
        format: of the others: two values a block above a float minimum; the paper's is one block a row
            (``int1/channel/min``). That of the salient columns is the same in more bits.
        facts: with max|x|. Without any token the first columns are the salient ones.
        salient: share of the columns.
        salient_bits: bits of theirs.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width, max|x| unknown).
        SpecError: an option is out of range. UnsupportedError: a block of ``format`` is not two free values.
    """
    objective.check("ptq161", weight, format, facts)
    if (reason := refuse(format)) is not None:
        raise UnsupportedError(f"ptq161 to {format.name}", reason, "int1/channel/min would work")
    rows, columns = weight.shape
    if facts.largest is None:
        asked = f"ptq161 of a weight of shape {tuple(weight.shape)}"
        raise InputError(asked, "max|x| of its inputs is unknown: they were rotated", "leave the rotation out")
    count = salient_columns(columns, salient)
    order = foremost(facts.largest, count)
    beside: list[Term] = []
    if count:
        wide, kept = wider(format, salient_bits), weight[:, order[:count]].float()
        beside.append(Dense(QTensor.rounded(wide, kept)))
    if count < columns:
        dense = two_values(weight[:, order[count:]].float(), format)
        ones = torch.ones(columns - count, dtype=torch.float16)
        beside.append(Terms(dense.shape, (Dense(dense),), None, ones))
    return Terms((rows, columns), (Columns.of(order, tuple(beside)),))


def two_values(weight: Tensor, format: Format) -> QTensor:
    """``mu +- mean|w - mu|`` of every block, mu its mean: the two values that lose least with ``sign(w - mu)``."""
    blocks, mask = B.split(weight.double(), format.block), B.present(weight.shape[1], format.block).double()
    size = mask.sum(-1, keepdim=True)
    mean = blocks.sum(-1, keepdim=True) / size
    reach = ((blocks - mean).abs() * mask).sum(-1, keepdim=True) / size
    ends = torch.cat([mean - reach, mean + reach], -1).float()
    params = format.fit(ends, torch.ones(1, 1, 1))
    return QTensor.nearest(format, weight, params)


def refuse(format: Format) -> str | None:
    """None, or why a block of ``format`` is not two free values."""
    if format.levels != 2 or format.grid != "ends" or not format.free_offset:
        return "its blocks are not two values anywhere, such as those of int1/channel/min"
    return None


def wider(format: Format, bits: int) -> Format:
    """``format`` with ``bits`` a code.

    Raises:
        SpecError: out of range.
    """
    if type(bits) is not int or not 1 < bits <= 8:
        raise SpecError(f"ptq161 with salient_bits={bits!r}", "out of range", "2 to 8, e.g. 4")
    return replace(format, bits=bits)  # type: ignore[type-var]


def salient_columns(columns: int, salient: float) -> int:
    """How many of ``columns`` are salient.

    Raises:
        SpecError: ``salient`` is no share.
    """
    if not (given.number(salient) and 0 <= salient <= 1):
        raise SpecError(f"ptq161 with salient={salient!r}", "out of range", "a share of the columns, e.g. 0.2")
    return round(salient * columns)


def parts(format: Format, shape: tuple[int, int], *, salient: float, salient_bits: int) -> Parts:
    """Salient columns and others, the order of all columns, and a scale of 16 bits for each of the others."""
    rows, columns = shape
    count = salient_columns(columns, salient)
    found = [(wider(format, salient_bits), (rows, count)), (format, (rows, columns - count))]
    nbytes = index_dtype(columns).itemsize * columns + 2 * (columns - count)
    return Parts(tuple(part for part in found if part[1][1]), nbytes)
