# SPDX-License-Identifier: Apache-2.0
"""Rewrite: a change of a layer's inputs that its weight undoes, so that the layer's output stays what it was.

Every rewrite is linear, ``x' = x A`` with tokens as rows and A invertible. With W the weight (rows, columns)::

    apply(x)     = x A          what the layer does to its inputs when it runs
    inverse(x')  = x' A^-1
    weight(W)    = W A^-T       so that apply(x) @ weight(W).T == x @ W.T
    unweight(V)  = V A^T        what V, which works on rewritten inputs, is on the original ones
    facts        sum x' = (sum x) A,   sum x'^T x' = A^T (sum x^T x) A,   sum x'^2 its diagonal

    Scale       A = diag(scale)               A^-T = diag(1 / scale)
    Rotation    A = diag(signs) H / sqrt(k)   A^-T = A; H repeats Sylvester's symmetric H_k along the diagonal
    Chain       A = A_1 A_2 ...               A^-T = A_1^-T A_2^-T ...

The arrays of a rewrite are those that a file holds, in the dtype that they are stored in: what runs is what was read.
Everything is computed in float32, or in float64 where the input is.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.errors import InputError

RADIX_BITS = 6
"""Hadamard matrices of at most 2^6 are multiplied with; longer blocks take a product for each of several factors."""

Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Rewrite(ABC):
    """Abstract; see the module for the equations. ``x`` is (..., columns), ``weight`` (rows, columns)."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """The inputs that the rewritten weight works on, at least float32 whatever the dtype of ``x``."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Undoes :meth:`apply`."""

    @abstractmethod
    def weight(self, weight: Tensor) -> Tensor:
        """The weight for rewritten inputs."""

    @abstractmethod
    def unweight(self, weight: Tensor) -> Tensor:
        """Undoes :meth:`weight`."""

    @abstractmethod
    def facts(self, facts: Facts) -> Facts:
        """Facts of the rewritten inputs.

        Raises:
            InputError: they do not follow from ``facts``.
        """

    @property
    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """What a file holds, by name."""

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.arrays.values())


@final
@dataclass(frozen=True, eq=False)
class Scale(Rewrite):
    """``x' = x * scale``: ``scale`` (columns,) float16, finite and positive. 16 bits a column."""

    scale: Tensor
    kind: ClassVar[str] = "scale"
    mixes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise InputError("input scales", "not all are finite and positive", "quantize again")

    @staticmethod
    def storage(columns: int) -> Sizes:
        return {"scale": (torch.float16, (columns,))}

    @property
    def arrays(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale.to(_wide(x))

    def inverse(self, x: Tensor) -> Tensor:
        return x / self.scale.to(_wide(x))

    def weight(self, weight: Tensor) -> Tensor:
        return self.inverse(weight)

    def unweight(self, weight: Tensor) -> Tensor:
        return self.apply(weight)

    def facts(self, facts: Facts) -> Facts:
        scale = self.scale.float()
        return Facts(
            facts.columns,
            facts.tokens,
            facts.total * scale,
            facts.total_square * scale.square(),
            None if facts.largest is None else facts.largest * scale,
            None if facts.gram is None else facts.gram * torch.outer(scale, scale),
            None if facts.total_magnitude is None else facts.total_magnitude * scale,
            None if facts.fisher is None else facts.fisher * scale.square(),  # a weight is divided by its scale
        )


@final
@dataclass(frozen=True, eq=False)
class Rotation(Rewrite):
    """``x' = (x * signs) H / sqrt(k)``, k the largest power of two that divides ``columns``. 1 bit a column.

    ``signs``: uint8 (ceil(columns / 8),); bit ``i % 8``, counted from the lowest, of byte ``i // 8`` is set where
    column i changes its sign. Bits past the last column are zero.
    """

    columns: int
    signs: Tensor
    kind: ClassVar[str] = "rotation"
    mixes: ClassVar[bool] = True

    @staticmethod
    def random(columns: int, seed: int) -> Rotation:
        """Signs from SHAKE-256 of ``seed`` (0 to 2^64 - 1): the same on every machine and in every version."""
        data = bytearray(hashlib.shake_256(seed.to_bytes(8, "little")).digest(-(-columns // 8)))
        data[-1] &= (1 << ((columns - 1) % 8 + 1)) - 1
        return Rotation(columns, torch.tensor(list(data), dtype=torch.uint8))

    @staticmethod
    def storage(columns: int) -> Sizes:
        return {"signs": (torch.uint8, (-(-columns // 8),))}

    @property
    def arrays(self) -> dict[str, Tensor]:
        return {"signs": self.signs}

    @property
    def block(self) -> int:
        """Columns that are mixed with one another."""
        return power_of_two(self.columns)

    @cached_property
    def factors(self) -> Tensor:
        """The signs, each over sqrt(k): float64 (columns,)."""
        with torch.inference_mode(False):  # may later be used where gradients are taken
            bits = (self.signs.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
            signs: Tensor = 1 - 2 * bits.reshape(-1)[: self.columns].double()
            return signs / math.sqrt(self.block)

    def apply(self, x: Tensor) -> Tensor:
        return hadamard(x * self.factors.to(_wide(x)), self.block)

    def inverse(self, x: Tensor) -> Tensor:
        return hadamard(x.to(_wide(x)), self.block) * self.factors.to(_wide(x))

    def weight(self, weight: Tensor) -> Tensor:
        return self.apply(weight)

    def unweight(self, weight: Tensor) -> Tensor:
        return self.inverse(weight)

    def facts(self, facts: Facts) -> Facts:
        """As the module says; ``largest``, ``total_magnitude`` and ``fisher`` become None: they follow from no sum."""
        if facts.gram is None:
            raise InputError(
                f"facts of {self.columns} rotated inputs",
                "they do not follow from facts without the second moment",
                "collect them with gram=True",
            )
        upper = self.apply(self.apply(facts.gram).T)
        gram = upper.triu() + upper.triu(1).T
        return Facts(
            facts.columns, facts.tokens, self.apply(facts.total), gram.diagonal().clamp_min(0).clone(), None, gram
        )


STEPS: dict[str, type[Scale] | type[Rotation]] = {"scale": Scale, "rotation": Rotation}
"""What a chain is made of, by kind."""


@final
@dataclass(frozen=True, eq=False)
class Chain(Rewrite):
    """Rewrites in the order in which inputs go through them, arrays ``{position}_{array}``; the identity when empty."""

    steps: tuple[Scale | Rotation, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(step.kind for step in self.steps)

    @property
    def arrays(self) -> dict[str, Tensor]:
        return {f"{i}_{name}": tensor for i, step in enumerate(self.steps) for name, tensor in step.arrays.items()}

    def apply(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step.apply(x)
        return x

    def inverse(self, x: Tensor) -> Tensor:
        for step in reversed(self.steps):
            x = step.inverse(x)
        return x

    def weight(self, weight: Tensor) -> Tensor:
        for step in self.steps:
            weight = step.weight(weight)
        return weight

    def unweight(self, weight: Tensor) -> Tensor:
        for step in reversed(self.steps):
            weight = step.unweight(weight)
        return weight

    def facts(self, facts: Facts) -> Facts:
        for step in self.steps:
            facts = step.facts(facts)
        return facts


def storage(kinds: Sequence[str], columns: int) -> Sizes:
    """Dtype and shape of every array of a chain of these ``kinds`` on inputs of ``columns``.

    Raises:
        InputError: a kind is unknown.
    """
    for kind in kinds:
        if kind not in STEPS:
            raise InputError(f"rewrite {kind!r}", "no such kind", f"this fewbit knows {', '.join(STEPS)}")
    return {f"{i}_{name}": size for i, kind in enumerate(kinds) for name, size in STEPS[kind].storage(columns).items()}


def restore(kinds: Sequence[str], columns: int, arrays: Mapping[str, Tensor]) -> Chain:
    """The chain that these arrays (named as :attr:`Chain.arrays` names them) describe.

    Raises:
        InputError: a kind is unknown, an array is missing, of another dtype or shape, or holds what it cannot.
    """
    for name, (dtype, shape) in storage(kinds, columns).items():
        found = arrays.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != shape:
            what = "it is missing" if found is None else f"it is {found.dtype} {tuple(found.shape)}"
            raise InputError(f"input array {name}: {dtype} {shape}", what, "quantize again")
    steps: list[Scale | Rotation] = []
    for i, kind in enumerate(kinds):
        if kind == Scale.kind:
            steps.append(Scale(arrays[f"{i}_scale"]))
        else:
            steps.append(Rotation(columns, arrays[f"{i}_signs"]))
    return Chain(tuple(steps))


def power_of_two(columns: int) -> int:
    """The largest one that divides ``columns``."""
    return columns & -columns


def hadamard(x: Tensor, block: int) -> Tensor:
    """Every ``block`` consecutive entries of ``x`` (..., columns) times Sylvester's matrix: ``x H``, not normalised.

    ``H[i, j] = (-1)^popcount(i & j)``. Since H_ab is the Kronecker product of H_a and H_b, a block is multiplied by
    one small matrix for each digit of its index, the digits about equally wide.
    """
    shape, inner, bits = x.shape, 1, block.bit_length() - 1
    digits = -(-bits // RADIX_BITS)
    # Under autocast the products would be rounded to bfloat16; when the model runs they are not.
    device = x.device.type
    exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with exact:
        for digit in range(digits):
            size = 1 << (bits * (digit + 1) // digits - bits * digit // digits)
            matrix = _sylvester(size, x.dtype, x.device)
            x = x.reshape(-1, size) @ matrix if inner == 1 else matrix @ x.reshape(-1, size, inner)
            inner *= size
    return x.reshape(shape)


@lru_cache(maxsize=64)
def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # as above
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
