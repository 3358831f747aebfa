# SPDX-License-Identifier: Apache-2.0
"""Learned scales, offsets and tables under fixed codes, on the output of the block.

After EfficientQAT (Chen et al. 2024, arXiv:2407.11062), whose second phase trains the scales of a whole model with its
codes frozen; here each block follows its own error, with Adam, and every float16 array that the format stores is
learned: scales, minima, super scales, palettes, codebooks. An array p moves in its own unit::

    p = float16(p0 + r u),   |r| <= 1/2,   u = |p0| where all of p0 is positive, else the root mean square of p0

and the gradient goes straight through the rounding to float16. Values that files could not give back are never kept: a
block whose codes do not come back from its values, or whatever shares an array with one, keeps what it had.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import float16
from fewbit.core import format as F
from fewbit.core.format import Format, Param, Params, Vectors
from fewbit.core.qtensor import QTensor
from fewbit.core.tuning import Learnable, Values
from fewbit.errors import UnsupportedError

FAR = 0.5


def refuse(format: Format) -> str | None:
    """None, or why nothing of ``format`` can be learned under fixed codes."""
    return None if _learned(format) else "it keeps no float16 number a block, which is what it would learn"


def rate(iters: int, format: Format) -> float:
    """Of the unit of an array."""
    return 2e-3


def _learned(format: Format) -> list[Param]:
    return [param for param in format.params if param.dtype == torch.float16]


class Scales(Learnable):
    """Each value is r of the array of that name, one entry for what is stored once."""

    def __init__(self, weight: Tensor, qtensor: QTensor) -> None:
        self._format, self._rows = qtensor.format, qtensor.shape[0]
        if (reason := refuse(qtensor.format)) is not None:
            raise UnsupportedError(f"learned scales of {qtensor.format.name}", reason, "int4/g64/asym has scales")
        self._codes, self._stored = qtensor.logical()
        self._learned = _learned(self._format)
        self._from = {param.name: self._once(param, self._stored[param.name]).float() for param in self._learned}
        self._unit = {name: unit(values) for name, values in self._from.items()}
        self.start = {name: torch.zeros_like(values) for name, values in self._from.items()}
        self.bounds = dict.fromkeys(self._from, (-FAR, FAR))

    def _repeat(self, param: Param) -> int:
        """Rows, or blocks, that share an entry."""
        if param.per == "rows":
            return self._format.group_rows
        return self._format.fit_block // self._format.block if param.per == "span" else 1

    def _once(self, param: Param, values: Tensor) -> Tensor:
        """``values`` (rows, blocks, 1, ...) without what repeats."""
        if param.per == "tensor":
            return values[:1, :1]
        if param.per == "columns":
            return values[:1]
        if param.per == "rows":
            return values[:: self._repeat(param), :1]
        return values[:, :: self._repeat(param)]

    def _spread(self, param: Param, once: Tensor) -> Tensor:
        """Inverse of :meth:`_once`."""
        shape = self._stored[param.name].shape
        if param.per == "rows":
            once = once.repeat_interleave(self._repeat(param), 0)[: shape[0]]
        elif param.per == "span":
            once = once.repeat_interleave(self._repeat(param), 1)[:, : shape[1]]
        return once.expand(shape)

    def _moved(self, values: Values) -> dict[str, Tensor]:
        """The arrays as they are stored, each entry once."""
        return {name: float16.of(start + values[name] * self._unit[name]) for name, start in self._from.items()}

    def _params(self, values: Values) -> dict[str, Tensor]:
        moved = self._moved(values)
        return {**self._stored, **{p.name: self._spread(p, moved[p.name]) for p in self._learned}}

    def _decode(self, params: Params) -> Tensor:
        return F.decode(self._format, self._codes, params)[: self._rows]

    def weight(self, values: Values) -> Tensor:
        return self._decode(self._params(values))

    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaves = {name: moved.float().requires_grad_() for name, moved in self._moved(values).items()}
            params = {**self._stored, **{p.name: self._spread(p, leaves[p.name]) for p in self._learned}}
            found = torch.autograd.grad(self._decode(params), list(leaves.values()), grad)
        return {name: one * self._unit[name] for name, one in zip(leaves, found, strict=True)}

    def freeze(self, values: Values) -> QTensor:
        params = self._params(values)
        physical = self._format.physical(params)
        # of sums of two vectors no format asks that they come back
        sums = isinstance(physical, Vectors) and len(physical.books) > 1
        lost = self._lost(params) & ~self._lost(self._stored)
        if bool(lost.any()) and not sums:
            for param in self._learned:
                before, after = self._stored[param.name], params[param.name]
                kept = self._shared(param, lost).reshape(*lost.shape, *[1] * (after.ndim - 3))
                params[param.name] = torch.where(kept, before, after)
        return QTensor.of(self._format, self._codes, params, self._rows)

    def _lost(self, params: Params) -> Tensor:
        """(rows, blocks, 1): blocks in which some code, used or not where there are few, does not come back from its
        value."""
        format, size = self._format, self._format.block // self._format.dim
        if format.dim == format.height == 1:
            codes = B.split(self._codes, size)
            if format.levels <= codes.shape[-1]:
                every = torch.arange(format.levels, dtype=codes.dtype, device=codes.device)
                codes = every.expand(*codes.shape[:2], format.levels)
            return (format.encode(format.decode(codes, params), params) != codes).any(-1, keepdim=True)
        again = F.encode(self._format, F.decode(self._format, self._codes, params), params)
        return (B.split(again, size) != B.split(self._codes, size)).any(-1, keepdim=True)

    def _shared(self, param: Param, lost: Tensor) -> Tensor:
        """``lost`` of anything that shares an entry of ``param``, (rows, blocks, 1)."""
        shape, repeat = lost.shape, self._repeat(param)
        if param.per == "tensor":
            return lost.any().expand(shape)
        if param.per == "columns":
            return lost.any(0, keepdim=True).expand(shape)
        if param.per == "rows":
            padded = torch.constant_pad_nd(lost, (0, 0, 0, 0, 0, -shape[0] % repeat))
            groups = padded.reshape(-1, repeat * shape[1]).any(1)
            return groups.repeat_interleave(repeat)[: shape[0], None, None].expand(shape)
        padded = torch.constant_pad_nd(lost, (0, 0, 0, -shape[1] % repeat))
        spans = padded.reshape(shape[0], -1, repeat).any(-1)
        return spans.repeat_interleave(repeat, 1)[:, : shape[1], None]


def unit(values: Tensor) -> Tensor:
    """What an entry of ``values`` moves by."""
    if bool((values > 0).all()):
        return values
    return values.square().mean().sqrt().clamp_min(2.0**-24).expand_as(values)
