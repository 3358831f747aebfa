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
    Hadamard    A = diag(signs) H / sqrt(n)   A^-T = A; H is of the whole width n (:mod:`fewbit.core.orders`)
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
from typing import ClassVar, TypeVar, final

import torch
from torch import Tensor

from fewbit.core.facts import Facts
from fewbit.core.orders import order_of, paley
from fewbit.errors import InputError

RADIX_BITS = 6
"""Hadamard matrices of at most 2^6 are multiplied with; longer blocks take a product for each of several factors."""

Sizes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
S = TypeVar("S", bound="Signed")


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
        return sum(tensor.nbytes for tensor in self.arrays.values())


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
            facts.output_square,
            ends=None if facts.ends is None else self.apply(facts.ends),
        )


@dataclass(frozen=True, eq=False)
class Signed(Rewrite):
    """Abstract: ``x' = (x * signs) H / sqrt(k)``, H of entries 0 and +-1, k of the latter in a row. 1 bit a column.

    ``signs``: uint8 (ceil(columns / 8),); bit ``i % 8``, counted from the lowest, of byte ``i // 8`` is set where
    column i changes its sign. Bits past the last column are zero.
    """

    columns: int
    signs: Tensor
    kind: ClassVar[str]
    mixes: ClassVar[bool] = True

    @classmethod
    def random(cls: type[S], columns: int, seed: int) -> S:
        """Signs from SHAKE-256 of ``seed`` (0 to 2^64 - 1): the same on every machine and in every version."""
        data = bytearray(hashlib.shake_256(seed.to_bytes(8, "little")).digest(-(-columns // 8)))
        data[-1] &= (1 << ((columns - 1) % 8 + 1)) - 1
        return cls(columns, torch.tensor(list(data), dtype=torch.uint8))

    @staticmethod
    def storage(columns: int) -> Sizes:
        return {"signs": (torch.uint8, (-(-columns // 8),))}

    @property
    def arrays(self) -> dict[str, Tensor]:
        return {"signs": self.signs}

    @property
    @abstractmethod
    def block(self) -> int:
        """Order of Sylvester's matrix in H."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Order of the matrix that stands beside it in H; 1 where there is none."""

    @cached_property
    def factors(self) -> Tensor:
        """The signs, each over sqrt(k): float64 (columns,)."""
        with torch.inference_mode(False):  # may later be used where gradients are taken
            bits = (self.signs.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=self.signs.device)) & 1
            signs: Tensor = 1 - 2 * bits.reshape(-1)[: self.columns].double()
            return signs / math.sqrt(self.block * self.order)

    def apply(self, x: Tensor) -> Tensor:
        return hadamard(x * self.factors.to(_wide(x)), self.block, self.order)

    def inverse(self, x: Tensor) -> Tensor:
        return hadamard(x.to(_wide(x)), self.block, self.order, transposed=True) * self.factors.to(_wide(x))

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
            facts.columns,
            facts.tokens,
            self.apply(facts.total),
            gram.diagonal().clamp_min(0).clone(),
            None,
            gram,
            output_square=facts.output_square,
        )


@final
@dataclass(frozen=True, eq=False)
class Rotation(Signed):
    """H block-diagonal, blocks Sylvester's of the largest power of two that divides ``columns``."""

    kind: ClassVar[str] = "rotation"

    @property
    def block(self) -> int:
        return power_of_two(self.columns)

    @property
    def order(self) -> int:
        return 1


@final
@dataclass(frozen=True, eq=False)
class Hadamard(Signed):
    """H = H_order x H_block over all ``columns``: every one is mixed with every other.

    Raises:
        InputError: no such matrix is known for that many columns.
    """

    kind: ClassVar[str] = "hadamard"

    def __post_init__(self) -> None:
        if order_of(self.columns) is None:
            works = "a width of a power of two times 1, 12, 20, 28, 36 or another order of Paley's"
            raise InputError(f"a Hadamard matrix of {self.columns} columns", "none is known here", works)

    @property
    def block(self) -> int:
        return self.columns // self.order

    @property
    def order(self) -> int:
        return order_of(self.columns) or 1


Step = Scale | Rotation | Hadamard

STEPS: dict[str, type[Scale] | type[Rotation] | type[Hadamard]] = {
    "scale": Scale,
    "rotation": Rotation,
    "hadamard": Hadamard,
}
"""What a chain is made of, by kind."""


@final
@dataclass(frozen=True, eq=False)
class Chain(Rewrite):
    """Rewrites in the order in which inputs go through them, arrays ``{position}_{array}``; the identity when empty."""

    steps: tuple[Step, ...] = ()

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
    steps: list[Step] = []
    for i, kind in enumerate(kinds):
        if kind == Scale.kind:
            steps.append(Scale(arrays[f"{i}_scale"]))
        else:
            made = Hadamard if kind == Hadamard.kind else Rotation
            steps.append(made(columns, arrays[f"{i}_signs"]))
    return Chain(tuple(steps))


def power_of_two(columns: int) -> int:
    """The largest one that divides ``columns``."""
    return columns & -columns


def hadamard(x: Tensor, block: int, order: int = 1, transposed: bool = False) -> Tensor:
    """Every ``order * block`` consecutive entries of ``x`` (..., columns) times ``H_order x H_block``, not normalised.

    ``H_block[i, j] = (-1)^popcount(i & j)``, Sylvester's; H_order is Paley's, or its transpose where ``transposed``.
    Since H_ab is the Kronecker product of H_a and H_b, entries are multiplied by one small matrix for each digit of
    their index, the digits of ``block`` about equally wide.
    """
    shape, inner, bits = x.shape, 1, block.bit_length() - 1
    digits = -(-bits // RADIX_BITS)
    matrices = []
    for digit in range(digits):
        size = 1 << (bits * (digit + 1) // digits - bits * digit // digits)
        matrices.append(_sylvester(size, x.dtype, x.device))
    if order > 1:
        matrix = _paley(order, x.dtype, x.device)
        matrices.append(matrix if transposed else matrix.T)  # x H, index by index, is H^T times the index's axis
    # Under autocast the products would be rounded to bfloat16; when the model runs they are not.
    device = x.device.type
    exact = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with exact:
        for matrix in matrices:
            size = len(matrix)
            x = x.reshape(-1, size) @ matrix.T if inner == 1 else matrix @ x.reshape(-1, size, inner)
            inner *= size
    return x.reshape(shape)


@lru_cache(maxsize=64)
def _paley(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return paley(order).to(dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # as above
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
