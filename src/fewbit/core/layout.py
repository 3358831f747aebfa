# SPDX-License-Identifier: Apache-2.0
"""Layout: where the bits lie in memory. A bijection between logical codes and bytes, bit-exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewbit.core.format import Format, Params

Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One row of the layout table.

    * ``refuse(format, shape)``: None, or the reason why this layout cannot hold it.
    * ``pack(format, shape, codes, params) -> (packed, stored)``: ``codes`` (rows / height, columns / dim) and logical
      ``params`` (rows / height, blocks, 1) to the bytes and parameter arrays as they lie in a file.
    * ``unpack(format, shape, packed, stored) -> (codes, params)``: the inverse, bit-exact.
    """

    name: str
    refuse: Callable[[Format, Shape], str | None]
    pack: Callable[[Format, Shape, Tensor, Params], tuple[Tensor, dict[str, Tensor]]]
    unpack: Callable[[Format, Shape, Tensor, Params], tuple[Tensor, dict[str, Tensor]]]


UNPACKED = Layout(
    "unpacked",
    refuse=lambda format, shape: None,
    pack=lambda format, shape, codes, params: (codes, dict(params)),
    unpack=lambda format, shape, packed, stored: (packed, dict(stored)),
)
"""A byte a code (four above 8 bits), parameters as they are: what methods return, before a layout is chosen."""
