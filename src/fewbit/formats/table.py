# SPDX-License-Identifier: Apache-2.0
"""Fixed tables under a scale per block, float16 or coded itself: ``w = scale * table[code]``.

Codes index the table in ascending order, whatever order a file of another tool uses: its layout translates.
The scale puts the largest magnitude of the table on the largest magnitude of the block.

=========  ======  ================================================================================================
``nf4``    16      quantiles of a normal distribution, exact 0 (Dettmers et al. 2023, arXiv:2305.14314, appendix E)
``fp4``    15      E2M1: 0, 1/2, 1, 3/2, 2, 3, 4, 6 and their negatives (OCP Microscaling Formats v1.0)
``fp4bnb``  15      bitsandbytes' FP4: that by 6, but 1/192 in place of its least value
``pot{b}`` 2^b-1   0 and +-2^-k, k = 0 .. 2^(b-1) - 2 (powers of two: a product is a shift)
=========  ======  ================================================================================================

Tables of floats and powers of two have one zero, not two: a second code for the same value could not come back from
``encode``.
With ``/dq`` scales are coded in 8 bits, as :mod:`fewbit.formats.dynamic` says: NF4's double quantization.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.core import float16, lookup
from fewbit.core.format import Format, Param, Params, Physical
from fewbit.formats.dynamic import CHUNK, PARAMS, code_scales, decode_scales
from fewbit.formats.scales import SMALLEST_SCALE, divisor, spell_group, storable

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_FP4_BNB = tuple(magnitude / 12 for magnitude in (0.0625, 2, 3, 4, 6, 8, 12))


def powers_of_two(bits: int) -> tuple[float, ...]:
    """0 and +-2^-k, ascending: 2^bits - 1 values."""
    magnitudes = [2.0**-k for k in range(2 ** (bits - 1) - 1)]
    return (*(-m for m in magnitudes), 0.0, *reversed(magnitudes))


TABLES: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    "fp4": E2M1,
    "fp4bnb": (*(-m for m in reversed(_FP4_BNB)), 0.0, *_FP4_BNB),
    **{f"pot{bits}": powers_of_two(bits) for bits in range(2, 9)},
}

_POT_SMALLEST = 2.0**-14
"""Scale floor of powers of two: 2^-14 times the least value of ``pot8``, 2^-126, is still a float32 of 9 bits."""


@functools.lru_cache
def bounds_of(table: tuple[float, ...]) -> Tensor:
    """Float32 (levels - 1,): values up to ``bounds[i]`` inclusive belong to ``table[i]`` rather than ``table[i + 1]``.

    Cached, as a solver that goes column by column asks for it once a column.
    """
    zero = table.index(0.0)
    bounds = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(table)], dtype=torch.float32)
    # lookup sends a value equal to a bound down; one step lower, the bound sends it up
    up = torch.tensor([(i - zero) % 2 == 1 for i in range(len(bounds))])
    return torch.where(up, torch.nextafter(bounds, torch.full_like(bounds, -math.inf)), bounds)


def nearest(values: Tensor, table: tuple[float, ...]) -> Tensor:
    """Index (uint8) of the entry of ascending ``table`` nearest to each of ``values``.

    A tie goes to the neighbour that is an even number of entries away from zero; with E2M1 that is the even mantissa.
    """
    return lookup.codes(values, bounds_of(table))


def look_up(codes: Tensor, table: tuple[float, ...]) -> Tensor:
    """Float32 ``table[codes]``."""
    return lookup.values(codes, torch.tensor(table, dtype=torch.float32, device=codes.device))


@dataclass(frozen=True)
class Table(Format):
    """``{family}/g{block}[/dq]`` with ``family`` a key of :data:`TABLES`; ``coded``: whether scales are coded.

    True bits per weight: ``bits + 16 / block``, coded ``bits + 8 / block + 32 / (256 block)`` and 32 bits a tensor.
    """

    family: str
    block: int
    coded: bool = False

    dim = 1

    @property
    def values(self) -> tuple[float, ...]:
        """Ascending."""
        return TABLES[self.family]

    @property
    def name(self) -> str:
        return f"{self.family}/{spell_group(self.block)}{'/dq' if self.coded else ''}"

    @property
    def params(self) -> tuple[Param, ...]:
        return PARAMS if self.coded else (Param("scale", 16, torch.float16, least=self._smallest),)

    @property
    def chunk(self) -> int:  # type: ignore[override]
        return CHUNK if self.coded else 0

    @property
    def group_rows(self) -> int:  # type: ignore[override]
        return 0 if self.coded else 1

    @property
    def plain(self) -> Table | None:  # type: ignore[override]
        return replace(self, coded=False) if self.coded else None

    @property
    def levels(self) -> int:
        return len(self.values)

    @property
    def bounds(self) -> Tensor | None:  # type: ignore[override]
        return None if self.coded else bounds_of(self.values)

    @property
    def bits(self) -> int:  # type: ignore[override]
        return (self.levels - 1).bit_length()

    @property
    def fit_block(self) -> int:
        return 0 if self.coded else self.block

    @property
    def _smallest(self) -> float:
        return _POT_SMALLEST if self.family.startswith("pot") else SMALLEST_SCALE

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        scale = blocks.abs().amax(-1, keepdim=True) / self.values[-1]
        if self.coded:
            return code_scales(scale.clamp(self._smallest, float16.LARGEST))
        return {"scale": storable(scale, self._smallest)}

    def of_plain(self, params: Params) -> dict[str, Tensor]:
        return code_scales(params["scale"].float())

    def _scale(self, params: Params) -> Tensor:
        return decode_scales(params, self._smallest) if self.coded else params["scale"].float()

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        return nearest(blocks / divisor(self._scale(params)), self.values)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self._scale(params) * look_up(codes, self.values)

    def physical(self, params: Params) -> Physical:
        return Physical(self._scale(params).squeeze(-1), None, torch.tensor(self.values, dtype=torch.float32))
