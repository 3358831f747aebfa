# SPDX-License-Identifier: Apache-2.0
"""Palettes: a table of levels that is fitted to the weights, by exact weighted k-means: ``w = [scale *] table[code]``.

One table a tensor, a group of rows (output channels) or a row, float16, ascending. With a scale a row or a block, as in
:mod:`fewbit.formats.table`, the largest magnitude of the block is divided out before values are clustered. A weight of
importance v costs ``v (w - scale * table[code])^2``; given the scales, k-means of :mod:`fewbit.core.scalars` finds the
least sum of that. Importance may be E[x^2] of the inputs, or the Fisher diagonal, weight by weight (SqueezeLLM, Kim et
al. 2023, arXiv:2306.07629; coremltools calls that sensitive k-means).

Levels are rounded to float16, or with ``lut8`` to int8 under one float16 scale a table. Those that a table has to
spare, where fewer values than levels differ, are neighbours of others among these numbers: every code has a value of
its own. Between two equally near levels the lower one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.core import float16, lookup, scalars
from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.scales import SMALLEST_SCALE, divisor, spell_group, storable, weights

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Bits of a code."""
LARGEST_ENTRY = 127
"""Of a table of int8."""


@dataclass(frozen=True)
class Palette(Format):
    """``palette{width}[/rows{N} | /row][/lut8][/g{block} | /channel]``; ``group_rows`` is 0 for one table a tensor,
    ``block`` 0 for one scale a row where there are scales at all; ``lut8``: tables of int8.

    True bits per weight: ``width + 16 2^width / (group_rows columns)``, with ``lut8`` ``width + (8 2^width + 16) /
    (group_rows columns)``, and ``16 / block`` where there are scales.
    """

    width: int
    group_rows: int = 0
    scaled: bool = False
    block: int = 0
    lut8: bool = False

    dim = 1
    fit_block = 0
    best_fit = True

    @property
    def name(self) -> str:
        rows = {0: "", 1: "/row"}.get(self.group_rows, f"/rows{self.group_rows}")
        rows += "/lut8" if self.lut8 else ""
        return f"palette{self.width}{rows}{f'/{spell_group(self.block)}' if self.scaled else ''}"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.width

    @property
    def params(self) -> tuple[Param, ...]:
        bits, dtype, per = 8 if self.lut8 else 16, torch.int8 if self.lut8 else torch.float16, self._per
        found = [Param("table", bits, dtype, per, (self.levels,))]
        found += [Param("table_scale", 16, torch.float16, per, least=SMALLEST_SCALE)] if self.lut8 else []
        return (*found, Param("scale", 16, torch.float16, least=SMALLEST_SCALE)) if self.scaled else tuple(found)

    @property
    def _per(self) -> Literal["rows", "tensor"]:
        return "rows" if self.group_rows else "tensor"

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        rows, number, size = blocks.shape
        found, values, each = {}, blocks, self.group_rows or rows
        worth: Tensor | None = importance
        if self.scaled:
            found["scale"] = storable(blocks.abs().amax(-1, keepdim=True))
            scale = found["scale"].float()
            worth = weights(blocks, importance.expand_as(blocks)) * scale.square() / scale.square().amax()
            values = blocks / scale
        elif rows % each == 0 and bool(importance.amin() == importance.amax()):
            worth = None
        groups = [values.clamp(-float16.LARGEST, float16.LARGEST)]
        groups += [] if worth is None else [worth.expand_as(blocks)]
        if rows % each:  # rows that weigh nothing
            groups = [torch.nn.functional.pad(group, (0, 0, 0, 0, 0, -rows % each)) for group in groups]
        groups = [group.reshape(-1, each * number * size) for group in groups]
        centers = scalars.centers(groups[0], None if worth is None else groups[1], self.levels)
        stored = _whole(centers) if self.lut8 else {"table": _distinct(centers)}
        for name, tables in stored.items():
            tables = tables[:, None, None]
            tables = tables.repeat_interleave(each, 0)[:rows] if self.group_rows else tables
            found[name] = tables.expand(rows, number, 1, *tables.shape[3:])
        return found

    def _tables(self, params: Params) -> Tensor:
        """Float32 (rows, levels); one row where all share it."""
        tables = params["table"][:, 0, 0].float()
        tables = tables * params["table_scale"][:, 0].float() if self.lut8 else tables
        return tables if self.group_rows else tables[:1]

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        tables = self._tables(params)
        values = blocks / divisor(params["scale"]) if self.scaled else blocks
        bounds = (tables[:, 1:] + tables[:, :-1]) / 2
        return lookup.codes(values, bounds.expand(len(values), -1) if self.group_rows else bounds[0])

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        tables = self._tables(params)
        values = lookup.values(codes, tables.expand(len(codes), -1) if self.group_rows else tables[0])
        return params["scale"].float() * values if self.scaled else values

    def physical(self, params: Params) -> Physical:
        tables = self._tables(params)
        ones = params["table"].new_ones(params["table"].shape[:2], dtype=torch.float32)
        scale = params["scale"].float().squeeze(-1) if self.scaled else ones
        return Physical(scale, None, tables if self.group_rows else tables[0])


def _distinct(centers: Tensor) -> Tensor:
    """Ascending float64 ``centers`` (tables, levels) as float16, each different: what repeats another becomes one of
    the float16 that follow the level with the most room after it (or precede the first, where there is most)."""
    cells = scalars.cells(centers.to(torch.float16))
    levels, last = cells.shape[1], scalars.CELLS - 1
    repeats = torch.nn.functional.pad(cells[:, 1:] == cells[:, :-1], (1, 0))
    if not bool(repeats.any()):
        return scalars.of_cells(cells)
    room = torch.diff(cells, dim=1, append=cells.new_full((len(cells), 1), last))
    most, at = room.max(1, keepdim=True)
    before = cells[:, :1] + last
    start = torch.where(before > most, cells[:, :1] - levels, cells.gather(1, at))
    spare = start + repeats.cumsum(1)
    return scalars.of_cells(torch.where(repeats, spare, cells).sort(1).values)


def _whole(centers: Tensor) -> dict[str, Tensor]:
    """Ascending float64 ``centers`` (tables, levels) as int8 entries, each different, and their scale (tables,)."""
    scale = storable(centers.abs().amax(1) / LARGEST_ENTRY)
    count = torch.arange(centers.shape[1])
    entries = (centers / scale.double()[:, None]).round().clamp(-LARGEST_ENTRY, LARGEST_ENTRY).long()
    # one above the last where they repeat, then back from the end
    entries = (entries - count).cummax(1).values + count
    entries = torch.minimum(entries, LARGEST_ENTRY - count.flip(0))
    return {"table": entries.to(torch.int8), "table_scale": scale}
