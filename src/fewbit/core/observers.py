# SPDX-License-Identifier: Apache-2.0
"""Observers: which range of a layer's inputs a fixed grid should cover, from what calibration saw of them.

What was seen is a value, :class:`Seen`, merged in any grouping; an observer is a function of it, so several can be
compared on one pass::

    minmax       [min x, max x]                                     nothing is clipped; one outlier sets the step
    average      lo <- (1 - c) lo + c lo_batch, and so for hi       of the batches in their order
    percentile   +-t, t the p-quantile of |x| over all batches      within [min, max]
    mse          r [min, max], r of least sum |x - Q(x)|^power      100 ratios from 1 down to 0.2
    entropy      +-t, t of least KL divergence of the histogram     TensorRT's search
    dobi         both ends moved in, or the upper one alone         200 ranges; the least sum of squares

Sources: Krishnamoorthi 2018, arXiv:1806.08342 (the first two); Migacz 2017, "8-bit inference with TensorRT" (entropy);
Frantar et al. 2022, github.com/IST-DASLab/gptq, quant.py (the grid of mse); Liu et al. 2024, arXiv:2406.06649 (dobi).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbit.core.rows import Optioned, find
from fewbit.core.sums import all_finite
from fewbit.errors import InputError

BINS = 4096
"""Most bins from the least number, or 0, to the largest, or 0; whatever the range, at least half as many."""
KL_BINS = 2048
"""Most bins of |x| that the search of ``entropy`` tells apart."""
_LEAST = -126

Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Seen:
    """All numbers of a stream: how many lie in each bin, and the range of each batch.

    Bin k holds ``floor(x / 2^exponent) == k``; ``counts`` (int64) are of bins ``first``, ``first + 1``, ... The
    exponent follows from the range alone, and where the range grows, bins join by powers of two: counts are those of
    the pooled stream, bit for bit, however it was cut and in whatever order it was merged.
    """

    exponent: int
    first: int
    counts: Tensor
    batches: tuple[Range, ...]

    @staticmethod
    def none() -> Seen:
        """Nothing: the identity of :meth:`merge`."""
        return Seen(_LEAST, 0, torch.zeros(0, dtype=torch.int64), ())

    @staticmethod
    def of(x: Tensor) -> Seen:
        """Of one batch, any shape and float dtype.

        Raises:
            InputError: it holds NaN or infinity.
        """
        flat = x.detach().reshape(-1).float()
        if not flat.numel():
            return Seen.none()
        low, high = (float(end) for end in torch.aminmax(flat))
        if not math.isfinite(low) or not math.isfinite(high):
            found = f"{int((~flat.isfinite()).sum())} of {flat.numel()} inputs are NaN or infinite"
            raise InputError("observing the range of a layer's inputs", found, "check that the model runs in float")
        exponent = _exponent(low, high)
        first = _bin(low, exponent)
        # Exact: a power of two changes no digit, but one below 1 may leave less than a float32 tells from 0.
        scaled = (flat if exponent <= 0 else flat.double()) * math.ldexp(1.0, -exponent)
        return Seen(exponent, first, torch.bincount(scaled.floor_().sub_(first).int()), ((low, high),))

    @staticmethod
    def kept(counts: Tensor, ends: Tensor) -> Seen:
        """Whose ``counts`` and ``ends``, float32 (batches, 2), these are: all else follows from them.

        Raises:
            InputError: they are of no stream.
        """
        batches = tuple((float(low), float(high)) for low, high in ends.reshape(-1, 2))
        seen = Seen(_LEAST, 0, counts, batches)
        if not all_finite(ends) or any(low > high for low, high in batches):
            raise InputError("a histogram of inputs", "the ends of its batches are no ranges")
        exponent = _exponent(seen.low, seen.high)
        first, last = _bin(seen.low, exponent), _bin(seen.high, exponent)
        bins = last - first + 1 if batches else 0
        if len(counts) != bins or bool((counts < 0).any()):
            raise InputError("a histogram of inputs", f"its {len(counts)} counts are not those of {bins} bins")
        return Seen(exponent, first, counts, batches) if batches else seen

    @property
    def ends(self) -> Tensor:
        """Least and largest of each batch, float32 (batches, 2)."""
        return torch.tensor(self.batches, dtype=torch.float32).reshape(-1, 2)

    def merge(self, other: Seen) -> Seen:
        """Both streams, ``other`` after this one."""
        if not self.batches or not other.batches:
            return self if self.batches else other
        batches = self.batches + other.batches
        low, high = min(low for low, _ in batches), max(high for _, high in batches)
        exponent = _exponent(low, high)
        first = _bin(low, exponent)
        counts = torch.zeros(_bin(high, exponent) - first + 1, dtype=torch.int64)
        for part in (self, other):
            bins = torch.arange(part.first, part.first + len(part.counts)) >> (exponent - part.exponent)
            counts.index_add_(0, bins - first, part.counts)
        return Seen(exponent, first, counts, batches)

    @property
    def low(self) -> float:
        return min((low for low, _ in self.batches), default=0.0)

    @property
    def high(self) -> float:
        return max((high for _, high in self.batches), default=0.0)

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self.exponent)

    def centers(self) -> Tensor:
        """Middles of the bins, float64."""
        return (torch.arange(self.first, self.first + len(self.counts)).double() + 0.5) * self.width

    def magnitudes(self) -> Tensor:
        """Counts of |x| in bins [k width, (k + 1) width) from k = 0 on, int64; of -k width one below."""
        bins = torch.arange(self.first, self.first + len(self.counts))
        folded = torch.where(bins < 0, -bins - 1, bins)
        return torch.zeros(int(folded.max()) + 1, dtype=torch.int64).index_add_(0, folded, self.counts)


def _exponent(low: float, high: float) -> int:
    """The least at which the range and 0 take at most BINS bins; it never falls as the range grows."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return _LEAST
    exponent = max(math.frexp((high - low) / BINS)[1] - 1, _LEAST)
    while _bin(high, exponent) - _bin(low, exponent) >= BINS:
        exponent += 1
    return exponent


def _bin(x: float, exponent: int) -> int:
    return math.floor(math.ldexp(x, -exponent))


def grid(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, int]:
    """(scale, zero) of the codes 0 .. 2^bits - 1 over a range widened to contain 0: ``x = scale * (code - zero)``.

    Symmetric: ``scale = 2 max(-low, high) / (2^bits - 1)``, ``zero = 2^(bits - 1)``, as int{bits}/sym has it. Otherwise
    ``scale = (high - low) / (2^bits - 1)``, ``zero = round(-low / scale)`` (Jacob et al. 2018, arXiv:1712.05877). The
    scale is a float32; that of a range of nothing is 2^-24.
    """
    low, high, top = min(low, 0.0), max(high, 0.0), (1 << bits) - 1
    wide = 2 * max(-low, high) if symmetric else high - low
    scale = float(torch.tensor(max(wide / top, 2.0**-24), dtype=torch.float32))
    return scale, 1 << (bits - 1) if symmetric else min(max(round(-low / scale), 0), top)


def minmax(seen: Seen, bits: int, symmetric: bool) -> Range:
    """All that was seen."""
    return seen.low, seen.high


def average(seen: Seen, bits: int, symmetric: bool, *, share: float = 0.01) -> Range:
    """Exponential moving average of the batches' ends, from the first batch's on; ``share`` is the newest one's."""
    low, high = seen.batches[0] if seen.batches else (0.0, 0.0)
    for ends in seen.batches[1:]:
        low, high = (1 - share) * low + share * ends[0], (1 - share) * high + share * ends[1]
    return low, high


def percentile(seen: Seen, bits: int, symmetric: bool, *, percent: float = 99.99) -> Range:
    """Clipped where |x| is below in ``percent`` of all that was seen: the quantile of the pool, to within a bin (not a
    mean of the batches' quantiles). Within its bin, |x| is taken to be spread evenly."""
    if not seen.batches:
        return 0.0, 0.0
    counts = seen.magnitudes().double()
    below = counts.cumsum(0)
    target = percent / 100 * float(below[-1])
    at = min(int(torch.searchsorted(below, target)), len(counts) - 1)
    inside = (target - float(below[at] - counts[at])) / max(float(counts[at]), 1.0)
    return _within(seen, (at + inside) * seen.width)


def mse(seen: Seen, bits: int, symmetric: bool, *, power: float = 2.0, steps: int = 100, floor: float = 0.2) -> Range:
    """``r [min, max]`` of least ``sum |x - Q(x)|^power``, x in the middles of their bins; of ``steps`` ratios from 1
    down to ``floor``, the largest wins ties. GPTQ's code takes 2.4 for ``power``."""
    if not seen.batches:
        return 0.0, 0.0
    ratios = (1 - (1 - floor) * step / (steps - 1) for step in range(steps))
    return _least(seen, ((ratio * seen.low, ratio * seen.high) for ratio in ratios), bits, symmetric, power)


def dobi(seen: Seen, bits: int, symmetric: bool, *, steps: int = 100) -> Range:
    """The bounds of least ``sum (x - Q(x))^2`` of two searches, x in the middles of their bins, i < ``steps``::

        two-sided    [min + i d / 2, max - i d / 2]        what has tails on both sides
        one-sided    [min, max - i d]                      what has a floor: behind softmax, ReLU, GELU

    with ``d = (max - min) / steps``: the first stage of 2DQuant (Distribution-Oriented Bound Initialization). The
    authors say which search an input gets; here the error does. The grid has a code for 0, as all grids here.
    """
    if not seen.batches:
        return 0.0, 0.0
    low, high, step = seen.low, seen.high, (seen.high - seen.low) / steps
    both = ((low + i * step / 2, high - i * step / 2) for i in range(steps))
    upper = ((low, high - i * step) for i in range(steps))
    return _least(seen, itertools.chain(both, upper), bits, symmetric, 2.0)


def _least(seen: Seen, ranges: Iterable[Range], bits: int, symmetric: bool, power: float) -> Range:
    """Of ``ranges``, that of least ``sum |x - Q(x)|^power`` over the middles of the bins; the first wins ties."""
    live = seen.counts > 0
    x, weight = seen.centers()[live], seen.counts[live].double()
    best, chosen = math.inf, (seen.low, seen.high)
    for low, high in ranges:
        scale, zero = grid(low, high, bits, symmetric)
        rounded = scale * ((x / scale + zero).round_().clamp_(0, (1 << bits) - 1) - zero)
        lost = float(((x - rounded).abs_() ** power * weight).sum())
        if lost < best:
            best, chosen = lost, (low, high)
    return chosen


def entropy(seen: Seen, bits: int, symmetric: bool) -> Range:
    """+-t, t the edge of a bin of |x|: that at which the histogram clipped there, and what the levels make of it,
    diverge least, ``KL(P || Q)``.

    P are the bins below t, the last one with all that is clipped added. Q spreads the bins below t (without what is
    clipped) over the levels, and each level evenly over its bins that are not empty. Bin 0 is left out: zeros behind a
    ReLU cost nothing and would outweigh all else. Levels: one sign's, 2^(bits - 1), or 2^bits where a grid that is not
    symmetric covers numbers of one sign.
    """
    if not seen.batches:
        return 0.0, 0.0
    counts, width = seen.magnitudes().double(), seen.width
    while len(counts) > KL_BINS:
        counts, width = torch.nn.functional.pad(counts, (0, len(counts) % 2)).reshape(-1, 2).sum(1), 2 * width
    counts[0] = 0
    one_sign = not symmetric and (seen.low >= 0 or seen.high <= 0)
    levels = 1 << (bits if one_sign else bits - 1)
    if len(counts) <= levels or float(counts.sum()) == 0:
        return seen.low, seen.high
    return _within(seen, (levels + int(_divergences(counts, levels).argmin())) * width)


_EMPTY = 1e-4
"""What an empty bin of a histogram counts, taken from those that are not."""


def _divergences(counts: Tensor, levels: int) -> Tensor:
    """KL(P || Q) of ``counts`` clipped at bin ``levels``, ``levels + 1``, ..., all of them: float64.

    Empty bins of P and of Q count :data:`_EMPTY`, which the others give in proportion (but at most half of what they
    have); both then add up to 1. Bin k belongs to level ``k levels // edge``, so that sums over levels are differences
    of running sums, and no histogram is made anew for each edge.
    """
    edges = torch.arange(levels, len(counts) + 1)
    running, live = (torch.nn.functional.pad(v.cumsum(0), (1, 0)) for v in (counts, (counts > 0).double()))
    entropies = torch.nn.functional.pad(torch.special.xlogy(counts, counts).cumsum(0), (1, 0))
    borders = -(-torch.arange(levels + 1) * edges[:, None] // levels)
    total, places = running[borders].diff(dim=1), live[borders].diff(dim=1)
    spread = total / places.clamp_min(1)  # Q of the live bins of each level
    inside, last = running[edges], counts[edges - 1]
    clipped = running[-1] - inside
    apart = (last == 0) & (clipped > 0)  # the last bin is empty in Q alone
    empty = edges - live[edges]
    p, p_norm = _share(running[-1], empty - apart.double())
    q, q_norm = _share(inside, empty)
    raised = torch.where(apart, 0.0, clipped)  # what the last bin has in P and not in Q
    self_terms = entropies[edges - 1] + torch.special.xlogy(last + raised, last + raised)
    cross = torch.special.xlogy(total, spread).sum(1) + torch.special.xlogy(raised, spread[:, -1])
    both = p / p_norm * (self_terms - cross + (inside + raised) * ((p / p_norm).log() - (q / q_norm).log()))
    alone = torch.where(apart, clipped * p / p_norm, 0.0)
    alone = torch.special.xlogy(alone, alone * q_norm / _EMPTY)
    neither = (empty - apart.double()) * _EMPTY / p_norm * (q_norm / p_norm).log()
    return torch.where(inside > 0, both + alone + neither, torch.inf)


def _share(total: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """What live bins keep of their counts, and what all bins then add up to."""
    given = _EMPTY * empty
    kept = 1 - (given / total).clamp_max(0.5)
    return kept, total * kept + given


def _within(seen: Seen, most: float) -> Range:
    return max(seen.low, -most), min(seen.high, most)


@dataclass(frozen=True)
class Observer(Optioned):
    """A row of the table. ``range(seen, bits, symmetric, **options)`` is (low, high). ``options``: names and defaults,
    the one first that a number behind the name is; ``limits``: least and greatest value of each."""

    kind: ClassVar[str] = "observer"
    name: str
    range: Callable[..., Range]
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)


OBSERVERS: tuple[Observer, ...] = (
    Observer("minmax", minmax),
    Observer("average", average, {"share": 0.01}, {"share": (1e-6, 1.0)}),
    Observer("percentile", percentile, {"percent": 99.99}, {"percent": (50.0, 100.0)}),
    Observer(
        "mse",
        mse,
        {"power": 2.0, "steps": 100, "floor": 0.2},
        {"power": (0.5, 8.0), "steps": (2, 10_000), "floor": (0.01, 0.99)},
    ),
    Observer("entropy", entropy),
    Observer("dobi", dobi, {"steps": 100}, {"steps": (1, 10_000)}),
)

NAMES = tuple(observer.name for observer in OBSERVERS)


def named(name: str) -> Observer:
    """The observer called ``name``.

    Raises:
        SpecError: there is none.
    """
    return find(OBSERVERS, name, "observer")
