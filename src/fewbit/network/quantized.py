# SPDX-License-Identifier: Apache-2.0
"""A quantized network, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fewbit.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Quantized:
    """``network`` runs on the kernels.

    ``layers``: a record each, as in the manifest; ``products``: likewise of those in integers, with the grids ``left``
    and ``right`` of their operands; ``skipped``: names of modules whose parameters stay as they are, and of products in
    float, with the reason; ``folded``: norm -> layer; ``batches``: that calibration saw; ``sequential``: whether each
    layer was solved on what the quantized ones before it make of them; ``loss``: what methods weighed weights by, None
    where none did.
    """

    network: nn.Module
    recipe: Recipe
    layers: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    folded: dict[str, str]
    seed: int
    batches: int
    sequential: bool = False
    products: list[dict[str, Any]] = field(default_factory=list)
    loss: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """True stored bits per weight of the quantized layers: codes, scales, tables, grids, those of products too."""
        weights = sum(record["shape"][0] * record["shape"][1] for record in self.layers)
        return float(8 * sum(record["nbytes"] for record in [*self.layers, *self.products]) / weights)
