# SPDX-License-Identifier: Apache-2.0
"""Locally adaptive quantization: the grid of each tile of a matrix, and its bits if asked for, follow its statistics.

A policy, not the algorithm of a paper: the name is a common one for grids that follow local statistics. Loss-aware
quantization (Hou, Kwok 2018, arXiv:1802.08635) and lazily aggregated quantized gradients only share its initials.

Every block gets its parameters by one ``statistic``: those that the format fits to it (``absmax``), or to its weights
between two percentiles of them (``percentile``), or those of least error under E[x^2] (``mse``, the search of
:mod:`fewbit.methods.clip`). With ``mean_bits`` each tile, a number of neighbouring blocks in all rows, has a width of
its own. For any lambda,

::

    b_t = argmin_b  err_t(b) + lambda bits_t(b),     err_t(b) = sum over its weights of E[x_i^2] (w - w_hat)^2

loses least among all choices of no more bits than these (Shoham, Gersho 1988). But few budgets are met by any lambda,
and which ones is up to the weights. So the bytes are settled by the shape and the budget alone, which a plan knows:
they are those of the split of the tiles into two neighbouring widths that comes closest to the budget from below. Of
all choices of widths that take exactly these bytes, the one that loses least is taken, by dynamic programming over the
tiles. Where a lambda leads to these bytes, that is its choice.

The result is columns in an order, the narrowest first, one matrix a width. Everything stored counts: codes, scales,
zero points (a row of them ends in a whole byte, in each matrix), and the order. Where columns are not whole tiles, the
last tile is short and has the width that the split gives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import format as F
from fewbit.core import given
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Terms, index_dtype
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import objective, ranges

STATISTICS = ("absmax", "percentile", "mse")
MOST_WIDTHS = 4


@exact()
def laq(
    weight: Tensor,
    format: Format,
    facts: Facts | None = None,
    *,
    statistic: str = "mse",
    percentile: float = 99.0,
    steps: int = 24,
    floor: float = 0.4,
    mean_bits: float = 0.0,
    widths: str = "2,3,4,8",
    tile: int = 1,
) -> QTensor | Terms:
    """Quantize ``weight`` (rows, columns) to the nearest values of grids that follow its tiles.

    Args:
        weight: float, (rows, columns).
        format: any whose codes stand for one weight each; with ``mean_bits``, integers in groups, of whatever width.
        facts: of the inputs; E[x^2] is used. Without facts, or when no token was seen, all inputs count the same.
        statistic: "absmax", "percentile" or "mse".
        percentile: where the range of a block ends; as many of its weights lie below the other end.
        steps, floor: of the search, as in :func:`fewbit.methods.clip`.
        mean_bits: the most true stored bits per weight; 0 is one matrix in ``format``.
        widths: bits that a code may have, four kinds at most.
        tile: blocks in a tile; spans, where blocks are fitted together.

    Returns:
        One matrix; or with ``mean_bits`` columns in an order.

    Raises:
        InputError: the weight or the facts cannot be used (NaN, wrong width).
        SpecError: an option is out of range, or too few bits for this shape.
        UnsupportedError: a code of ``format`` stands for several weights; or with ``mean_bits`` its blocks are no
            integers with parameters of their own.
    """
    objective.check("laq", weight, format, facts)
    objective.check_scalar("laq", format)
    ratios = _ratios(statistic, percentile, steps, floor)
    weight, shape = weight.float(), (weight.shape[0], weight.shape[1])
    square = torch.ones(shape[1]) if facts is None else facts.mean_square
    if not mean_bits:
        return _fitted(weight, format, square, ratios, percentile)
    tiles = Tiles.of(format, shape, mean_bits, widths, tile)
    found = [_fitted(weight, each, square, ratios, percentile) for each in tiles.formats]
    chosen = tiles.choose(torch.stack([_errors(weight, one, square, tiles.size) for one in found]))
    width_of = chosen.repeat_interleave(tiles.size)[: shape[1]]
    order = torch.argsort(width_of, stable=True)
    sides = [(one, order[width_of[order] == i]) for i, one in enumerate(found)]
    columns = Columns.of(order, tuple(Dense(_side(one, own)) for one, own in sides if len(own)))
    return Terms(shape, (columns,))


def parts(
    format: Format,
    shape: tuple[int, int],
    *,
    statistic: str,
    percentile: float,
    steps: int,
    floor: float,
    mean_bits: float,
    widths: str,
    tile: int,
) -> Parts:
    """One matrix; or the split that settles the bytes, and the order of the columns. What is chosen may be of other
    widths, of the same bytes.

    Raises:
        SpecError, UnsupportedError: as :func:`laq`.
    """
    _ratios(statistic, percentile, steps, floor)
    if not mean_bits:
        return Parts(((format, shape),), 0)
    tiles = Tiles.of(format, shape, mean_bits, widths, tile)
    sides = [(each, tiles.columns_of(tiles.split, i)) for i, each in enumerate(tiles.formats)]
    return Parts(tuple((each, (shape[0], own)) for each, own in sides if own), _order_bytes(shape[1]))


@dataclass(frozen=True)
class Split:
    """``whole``: tiles of each width; ``short``: the width, by its index, of what is left of the columns."""

    whole: tuple[int, ...]
    short: int


@dataclass(frozen=True)
class Tiles:
    """``columns`` of a matrix in tiles of ``size``; ``formats`` rise in width; ``split`` settles the bytes."""

    formats: tuple[Format, ...]
    columns: int
    size: int
    split: Split

    @staticmethod
    def of(format: Format, shape: tuple[int, int], mean_bits: float, widths: str, tile: int) -> Tiles:
        """Those of a matrix of ``shape`` (rows, columns) in ``mean_bits``, see :func:`laq`.

        Raises:
            SpecError, UnsupportedError: as :func:`laq`.
        """
        rows, columns = shape
        formats = _of_widths(format, widths)
        if not (given.number(mean_bits) and 0 < mean_bits < math.inf):
            raise SpecError(f"laq with mean_bits={mean_bits!r}", "no number of bits", "e.g. 3.3, or 0 for one matrix")
        if type(tile) is not int or tile < 1:
            raise SpecError(f"laq with tile={tile!r}", "no number of blocks", "1 or more would work")
        size = tile * max(format.block, format.fit_block)
        last, number = len(formats) - 1, columns // size
        splits = []
        for low in range(len(formats)):
            for above in range(number + 1 if low < last else 1):
                whole = [0] * len(formats)
                whole[low] = number - above
                whole[min(low + 1, last)] += above
                splits.append(Split(tuple(whole), low))
        tried = [Tiles(formats, columns, size, split) for split in splits]
        # Rounded: bits that someone worked out from bytes lead back to these.
        room = round(mean_bits * rows * columns / 8, 3) - _order_bytes(columns)
        fitting = [tiles for tiles in tried if rows * tiles.row_bytes() <= room]
        if not fitting:
            least = 8 * (min(tiles.row_bytes() for tiles in tried) * rows + _order_bytes(columns)) / (rows * columns)
            works = f"mean_bits={math.ceil(1000 * least) / 1000:g} or more, or larger groups"
            raise SpecError(f"laq of {shape} with mean_bits={mean_bits:g}", "even the narrowest takes more", works)
        return max(fitting, key=Tiles.row_bytes)

    def columns_of(self, split: Split, width: int) -> int:
        """Columns that ``split`` puts in the width with that index."""
        return split.whole[width] * self.size + (split.short == width) * (self.columns % self.size)

    def row_bytes(self) -> int:
        """Bytes that a row takes."""
        return sum(row_bytes(each, self.columns_of(self.split, i)) for i, each in enumerate(self.formats))

    def choose(self, errors: Tensor) -> Tensor:
        """(tiles,): the index of the width of each tile that takes the bytes of ``split`` and has the least sum of
        ``errors`` (widths, tiles), float64.

        Widths are chosen tile after tile. What is left to know of those before is how many ``units`` of bits they take
        beyond the narrowest width, and, as rows of arrays end in whole bytes, how many tiles each width has, up to
        multiples of those after which all end in whole bytes anyway.
        """
        number, bits = self.columns // self.size, [row_bytes(each, 8 * self.size) for each in self.formats]
        units = math.gcd(*(more - bits[0] for more in bits)) or 1
        steps = [(more - bits[0]) // units for more in bits]
        beyond = 8 * self.row_bytes() - number * bits[0]
        filling = [self._filling(i, bits[i]) for i in range(len(bits))]
        least = torch.full((*map(len, filling), beyond // units + 1), math.inf, dtype=torch.float64)
        least[(0,) * least.ndim] = 0
        came = []
        for lost in errors[:, :number].T.tolist():
            tried = [_shifted(least.roll(1, i), steps[i]) + error for i, error in enumerate(lost)]
            least, by = torch.stack(tried).min(0)
            came.append(by.to(torch.uint8))
        taken = units * torch.arange(least.shape[-1])
        for i, fill in enumerate(filling):
            taken = taken + torch.tensor(fill).reshape(-1, *[1] * (len(filling) - i))
        end = least.masked_fill(taken != beyond, math.inf).argmin()
        at, found = [int(i) for i in torch.unravel_index(end, least.shape)], []
        for by in reversed(came):
            found.append(width := int(by[tuple(at)]))
            at[width] = (at[width] - 1) % len(filling[width])
            at[-1] -= steps[width]
        short = [self.split.short] if self.columns % self.size else []
        return torch.tensor([*reversed(found), *short])

    def _filling(self, width: int, bits: int) -> list[int]:
        """Bits a row by which 0, 1, ... tiles of ``width``, and the short one where that has it, take more than
        ``bits`` each; as far as they do not repeat."""
        more = self.columns % self.size if self.split.short == width else 0
        found = [8 * row_bytes(self.formats[width], n * self.size + more) - n * bits for n in range(8)]
        return next(found[:n] for n in (1, 2, 4, 8) if found[:n] * (8 // n) == found)


def row_bytes(format: Format, columns: int) -> int:
    """Bytes of a row of codes and parameters, each of which ends in a whole byte."""
    entries = {"block": B.count(columns, format.block), "span": B.count(columns, format.fit_block)}
    return -(-columns * format.bits // 8) + sum(-(-entries[p.per] * p.bits // 8) for p in format.params)


def _order_bytes(columns: int) -> int:
    return columns * index_dtype(columns).itemsize


def _of_widths(format: Format, widths: str) -> tuple[Format, ...]:
    """``format`` in each of ``widths``, the narrowest first."""
    if not format.grid or not format.block or any(param.per not in ("block", "span") for param in format.params):
        found = "tiles of several widths are blocks of integers with parameters of their own"
        raise UnsupportedError(f"laq to {format.name} with mean_bits", found, "int3/g64/asym would work")
    texts = [text.strip() for text in str(widths).split(",")]
    bits = sorted({int(text) for text in texts if text.isdecimal()})
    if len(bits) != len(texts) or len(bits) > MOST_WIDTHS or not 2 <= bits[0] <= bits[-1] <= 8:
        found = f"they are not one to {MOST_WIDTHS} different numbers of bits from 2 to 8"
        raise SpecError(f"laq with widths={widths!r}", found, "2,3,4,8 would work")
    return tuple(replace(format, bits=each) for each in bits)  # type: ignore[type-var]


def _ratios(statistic: str, percentile: float, steps: int, floor: float) -> tuple[float, ...] | None:
    """Shrinking factors to try; none to fit the plain range, None to fit the range between percentiles."""
    ratios = ranges.grid(steps, floor)
    if statistic not in STATISTICS:
        raise SpecError(f"laq with statistic={statistic!r}", "no such statistic", f"{', '.join(STATISTICS)} exist")
    if not (given.number(percentile) and 50 < percentile <= 100):
        raise SpecError(f"laq with percentile={percentile!r}", "out of range", "above 50, to 100; e.g. 99")
    return {"absmax": (), "percentile": None, "mse": ratios}[statistic]


def _fitted(
    weight: Tensor, format: Format, square: Tensor, ratios: tuple[float, ...] | None, percentile: float
) -> QTensor:
    """``weight`` by the nearest codes under the parameters of its statistic."""
    format = format.bind(weight)
    if ratios is None:
        return QTensor.nearest(format, weight, F.fit(format, within(weight, format.block, percentile)))
    return QTensor.nearest(format, weight, ranges.search(format, weight, square, ratios))


def within(weight: Tensor, block: int, percentile: float) -> Tensor:
    """``weight`` (rows, columns), each block of a row cut off at two percentiles of it, linearly interpolated."""
    there = B.present(weight.shape[1], block) > 0
    shares = torch.tensor([1 - percentile / 100, percentile / 100], dtype=torch.float64)
    found = []
    for rows in ranges.strips(*weight.shape):
        blocks = B.split(weight[rows].double(), block)
        low, high = blocks.masked_fill(~there, math.nan).nanquantile(shares, -1, keepdim=True)
        found.append(B.join(blocks.clamp(low, high), weight.shape[1]).float())
    return torch.cat(found)


def _errors(weight: Tensor, made: QTensor, square: Tensor, size: int) -> Tensor:
    """(tiles,) float64: the squared error of each tile of ``size`` columns, weighted by ``square``."""
    total = torch.zeros(B.count(weight.shape[1], size), dtype=torch.float64)
    values = made.dequantize()
    for rows in ranges.strips(*weight.shape):
        lost = (values[rows].double() - weight[rows]).square_().mul_(square)
        total += B.split(lost, size).sum(-1).sum(0)
    return total


def _side(made: QTensor, columns: Tensor) -> QTensor:
    """The ``columns`` of ``made``, whole blocks of it in their order; nothing is fitted again."""
    codes, params = made.logical()
    blocks = columns[:: made.format.block] // made.format.block
    return QTensor.of(made.format, codes[:, columns], {name: values[:, blocks] for name, values in params.items()})


def _shifted(values: Tensor, by: int) -> Tensor:
    """``values`` (..., n) moved to the right by so many, infinity from the left."""
    return torch.constant_pad_nd(values, (by, 0), math.inf)[..., : values.shape[-1]]
