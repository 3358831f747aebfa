# SPDX-License-Identifier: Apache-2.0
"""Layers that are fed the same tensor (query, key, value; gate, up), computed together.

Who they are is learned by watching: a layer called with the very tensor object that the layer before was called with
will next time be computed beside it, and its result waits until it is asked for. Being wrong costs time, never a bit: a
result is given out only where all that it is a function of (the bits of x and of the bias, the prepared matrix, what
inputs go through before it) is what it was computed from; and a guess that failed once is not made again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit import kernels
from fewbit.core.rewrite import Chain

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Layer(Protocol):
    """Computes ``prepared(rewrite().apply(x), bias)`` in x's dtype; :meth:`alone` is that."""

    bias: nn.Parameter | None

    @property
    def prepared(self) -> kernels.Prepared: ...
    def rewrite(self) -> Chain: ...
    def alone(self, x: Tensor) -> Tensor: ...


def alike(a: Layer, b: Layer) -> bool:
    """Whether one kernel computes both, from inputs that go through the same rewrites and rounding."""
    here, there = a.rewrite(), b.rewrite()
    return (
        a.prepared.company is not None
        and a.prepared.company == b.prepared.company
        and here.kinds == there.kinds
        and all(torch.equal(array, there.arrays[name]) for name, array in here.arrays.items())
    )


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals itself and 0 is not -0."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


@dataclass(slots=True)
class _Waiting:
    """A result that nobody has asked for yet, and what it was computed from beside x."""

    y: Tensor
    prepared: kernels.Prepared
    rewrite: Chain
    bias: Tensor | None

    def serves(self, layer: Layer) -> bool:
        """Whether ``layer`` would compute the same from the same x, and in the same mode of torch."""
        return (
            self.y.is_inference() == torch.is_inference_mode_enabled()
            and self.prepared is layer.prepared
            and self.rewrite is layer.rewrite()
            and same_bits(self.bias, layer.bias)
        )


@dataclass(slots=True)
class _Fed:
    """The last tensor that layers were called with: the object, its bits, and who was called with it first."""

    x: weakref.ref[Tensor]
    bits: Tensor | None
    leader: Layer
    waiting: dict[Layer, _Waiting] = field(default_factory=dict)


class Sharing:
    """One for all layers of a model. Copies and pickles of a model start to learn anew."""

    def __init__(self) -> None:
        self._followers: dict[Layer, list[Layer]] = {}
        self._apart: set[Layer] = set()
        self._fed: _Fed | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (Sharing, ())

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """``layer.alone(x)``, bit for bit; perhaps computed beside an earlier layer."""
        if torch.is_grad_enabled() or x.dtype not in INTEGERS:
            return layer.alone(x)
        fed = self._fed
        if fed is None or fed.x() is not x:
            return self._lead(layer, x, fed)
        waiting = fed.waiting.pop(layer, None)  # once: what is given out may be changed by whoever has it
        if waiting is None:
            self._join(layer, fed.leader)
        elif waiting.serves(layer) and same_bits(fed.bits, x):
            return waiting.y
        return layer.alone(x)

    def _lead(self, layer: Layer, x: Tensor, before: _Fed | None) -> Tensor:
        """A new tensor: ``layer`` is computed, and so are those that followed it the last time."""
        failed = set(before.waiting) if before is not None else None
        if before is not None and failed:
            self._apart |= failed
            self._followers[before.leader] = [one for one in self._followers[before.leader] if one not in failed]
        followers = self._followers.get(layer, [])
        fed = self._fed = _Fed(weakref.ref(x), x.clone() if followers else None, layer)
        if not followers:
            return layer.alone(x)
        together = [layer, *followers]
        given = layer.rewrite().apply(x)
        ys = kernels.linear_many(given, [one.prepared for one in together], [one.bias for one in together])
        for one, y in zip(followers, ys[1:], strict=True):
            bias = None if one.bias is None else one.bias.clone()
            fed.waiting[one] = _Waiting(y.to(x.dtype), one.prepared, one.rewrite(), bias)
        return ys[0].to(x.dtype)

    def _join(self, layer: Layer, leader: Layer) -> None:
        """``layer`` was called with the tensor of ``leader``: next time it is computed beside it."""
        followers = self._followers.setdefault(leader, [])
        if layer is not leader and layer not in followers and layer not in self._apart and alike(layer, leader):
            followers.append(layer)
