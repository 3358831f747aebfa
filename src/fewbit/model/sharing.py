# SPDX-License-Identifier: Apache-2.0
"""Layers that are fed the same tensor (query, key, value; gate, up), computed together.

Who they are is learned by watching: a layer called with the very tensor object that the layer before was called with
will next time be computed beside it, and its result waits until it is asked for. Being wrong costs time, never a bit: a
result is given out only where all that it is a function of (the bits of x and of the bias, the prepared matrix, what
inputs go through before it) is what it was computed from; and a guess that failed once is not made again.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit import kernels
from fewbit.core.rewrite import Chain

FEW = 32
"""Tokens below which keeping watch costs more than rounding them once saves; rewriting them once always pays."""


class Layer(Protocol):
    """Computes ``prepared(rewrite().apply(x), bias)`` in x's dtype; :meth:`alone` is that."""

    bias: nn.Parameter | None
    rewrites: tuple[str, ...]

    @property
    def prepared(self) -> kernels.Prepared: ...
    def rewrite(self) -> Chain: ...
    def alone(self, x: Tensor) -> Tensor: ...


def alike(a: Layer, b: Layer) -> bool:
    """Whether one kernel computes both, from inputs that something is done to first, and the same."""
    here, there = a.rewrite(), b.rewrite()
    return (
        a.prepared.company is not None
        and a.prepared.company == b.prepared.company
        and (a.prepared.activation is not None or bool(a.rewrites))
        and here.kinds == there.kinds
        and all(torch.equal(array, there.arrays[name]) for name, array in here.arrays.items())
    )


def bits(x: Tensor | None) -> tuple[Any, ...] | None:
    """All that a tensor is, to be compared: NaN equals itself and 0 is not -0."""
    if x is None:
        return None
    dense = x.contiguous()
    return x.dtype, x.shape, x.stride(), ctypes.string_at(dense.data_ptr(), dense.nbytes)


@dataclass(slots=True)
class _Waiting:
    """A result that nobody has asked for yet, and what it was computed from beside x."""

    y: Tensor
    prepared: kernels.Prepared
    bias: tuple[Any, ...] | None

    def serves(self, layer: Layer) -> bool:
        """Whether ``layer`` would compute the same from the same x, and in the same mode of torch."""
        return (
            self.y.is_inference() == torch.is_inference_mode_enabled()
            and self.prepared is layer.prepared
            and self.bias == bits(layer.bias)
        )


@dataclass(slots=True)
class _Fed:
    """The last tensor that layers were called with: the object, its bits, and who was called with it first."""

    x: weakref.ref[Tensor]
    bits: tuple[Any, ...] | None
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
        few = x.numel() < FEW * x.shape[-1] and not layer.rewrites
        if few or torch.is_grad_enabled() or not x.is_cpu:
            return layer.alone(x)
        fed = self._fed
        if fed is None or fed.x() is not x or layer is fed.leader:
            return self._lead(layer, x, fed)
        waiting = fed.waiting.pop(layer, None)  # once: what is given out may be changed by whoever has it
        if waiting is None:
            self._join(layer, fed.leader)
        elif waiting.serves(layer) and fed.bits == bits(x):
            return waiting.y
        return layer.alone(x)

    def _lead(self, layer: Layer, x: Tensor, before: _Fed | None) -> Tensor:
        """A new tensor: ``layer`` is computed, and so are those that followed it the last time."""
        failed = set(before.waiting) if before is not None else None
        if before is not None and failed:
            self._apart |= failed
            self._followers[before.leader] = [one for one in self._followers[before.leader] if one not in failed]
        followers = self._followers.get(layer)
        fed = self._fed = _Fed(weakref.ref(x), bits(x) if followers else None, layer)
        if not followers:
            return layer.alone(x)
        together = [layer, *followers]
        given = layer.rewrite().apply(x)
        ys = kernels.linear_many(given, [one.prepared for one in together], [one.bias for one in together])
        if given.dtype != x.dtype:
            ys = [y.to(x.dtype) for y in ys]
        for one, y in zip(followers, ys[1:], strict=True):
            fed.waiting[one] = _Waiting(y, one.prepared, bits(one.bias))
        return ys[0]

    def _join(self, layer: Layer, leader: Layer) -> None:
        """``layer`` was called with the tensor of ``leader``: next time it is computed beside it."""
        followers = self._followers.setdefault(leader, [])
        if layer not in followers and layer not in self._apart and alike(layer, leader):
            followers.append(layer)
