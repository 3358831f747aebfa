# SPDX-License-Identifier: Apache-2.0
"""A product of two activations, as attention has two: queries with keys, and the map with values.

A network says where its products are by calling a :class:`Product` there, as it calls a layer::

    self.scores, self.mixed = Product(), Product()
    ...
    weights = self.scores(q, k.transpose(-2, -1)).softmax(-1)
    y = self.mixed(weights, v)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewbit import formats, kernels
from fewbit.errors import SpecError
from fewbit.formats.fixed import Fixed


class Product(nn.Module):
    """``a @ b``, in float: (..., rows, inner) and (..., inner, columns) -> (..., rows, columns). Its operands pass
    ``left`` and ``right``, where they are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Identity(), nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = self.left(a) @ self.right(b)
        return y


class QuantProduct(nn.Module):
    """The same of operands rounded to one grid each, multiplied and summed up as integers.

    ``left``, ``right``: bound grids, spelt.

    Raises:
        SpecError: one is no grid, or none that is known yet.
    """

    def __init__(self, left: str, right: str) -> None:
        super().__init__()
        self.grids = _grid(left), _grid(right)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return kernels.matmul(a, b, *self.grids)

    def record(self) -> dict[str, Any]:
        """What a manifest says of it, and the constructor is given back."""
        left, right = self.grids
        return {"left": left.name, "right": right.name, "nbytes": left.nbytes + right.nbytes}

    def extra_repr(self) -> str:
        return " @ ".join(grid.name for grid in self.grids)


def _grid(spelt: str) -> Fixed:
    found = formats.parse(spelt)
    if not isinstance(found, Fixed) or not found.bound:
        raise SpecError(f"an operand in {spelt}", "it is no known grid", "e.g. int8/static/sym/s0.05")
    return found
