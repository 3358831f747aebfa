# SPDX-License-Identifier: Apache-2.0
"""Vectors of a codebook: a code stands for ``length`` weights down a column, ``w = codebook[i]``, or with a residual
codebook ``w = codebook[i] + residual[j]`` (VPTQ, Liu et al. 2024, arXiv:2409.17066).

A code is ``i + 2^index_bits j``. Books are float16; all columns share them, or each group of columns has its own. The
fit is plain vector quantization: k-means of the vectors, seeded, each weighing as much as its weights do on average
(with importance by column, as the paper has it, all of a vector weigh the same), and next to nothing where one of them
does not count; the residual book is the k-means of what the first leaves. Encoding is greedy, as in the paper: the
nearest vector, then the nearest residual. So without a residual every value comes back as its code (the lowest, of
equal vectors); with one, a sum of two vectors may come back as the sum of two others. A vector that the last rows of a
matrix do not fill is nearest by the rows that it has, and an entry of its own only where a book has some to spare.

VPTQ's scale and bias of a column are not part of the format: scales are of the sum of terms around it. AQLM
(Egiazarian et al. 2024, arXiv:2401.06118) cuts along rows instead: the same format with ``dim`` and ``height`` swapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.core import clusters, float16
from fewbit.core.format import Format, Param, Params, Vectors, code_dtype
from fewbit.errors import SpecError

LENGTHS = (2, 4, 6, 8, 12, 16)
LEAST_BITS, MOST_BITS, MOST_CODE = 1, 16, 24
"""Of an index; of a whole code."""


@dataclass(frozen=True)
class Vector(Format):
    """``vector{length}x{index_bits}[+{residual_bits}][/g{block}]``.

    True bits per weight: ``(index_bits + residual_bits) / length``; and bits a group of columns: ``16 length
    (2^index_bits + 2^residual_bits)``, the second power only with a residual.
    """

    length: int
    index_bits: int
    residual_bits: int = 0
    block: int = 0

    dim = 1

    @property
    def name(self) -> str:
        residual = f"+{self.residual_bits}" if self.residual_bits else ""
        return f"vector{self.length}x{self.index_bits}{residual}{f'/g{self.block}' if self.block else ''}"

    @property
    def height(self) -> int:  # type: ignore[override]
        return self.length

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.index_bits + self.residual_bits

    @property
    def fields(self) -> dict[str, int]:
        """Bits of the indices in a code, by the name of their book, lowest first."""
        fields = {"codebook": self.index_bits, "residual": self.residual_bits}
        return {name: bits for name, bits in fields.items() if bits}

    @property
    def params(self) -> tuple[Param, ...]:
        return tuple(
            Param(name, 16, torch.float16, "columns", (1 << bits, self.length)) for name, bits in self.fields.items()
        )

    def fit(self, blocks: Tensor, importance: Tensor) -> dict[str, Tensor]:
        vectors = self._vectors(blocks.clamp(-float16.LARGEST, float16.LARGEST))
        largest = max(-126, min(126, int(torch.frexp(importance.amax()).exponent)))
        worth = self._vectors(importance.expand_as(blocks)) * 2.0**-largest  # so that parts of it do not vanish
        least, some = worth.amin(-1), worth.amax(-1)  # zero where a vector is padded
        shares = torch.where(least > 0, least + (worth - least.unsqueeze(-1)).mean(-1), clusters.SPARE * some)
        found: dict[str, list[Tensor]] = {name: [] for name in self.fields}
        for block in range(blocks.shape[1]):
            generator = torch.Generator().manual_seed(0)
            points, weights = vectors[:, block].reshape(-1, self.length), shares[:, block].reshape(-1)
            points, weights = clusters.sample(points, weights, 1 << max(self.fields.values()), generator)
            for name, bits in self.fields.items():
                book = clusters.means(points, weights, 1 << bits, generator).to(torch.float16)
                found[name].append(book)
                if name != self.params[-1].name:  # what the last book leaves is not needed
                    points = points - book[clusters.nearest(points, book)]
        return {name: _shared(torch.stack(books), len(blocks)) for name, books in found.items()}

    def encode(self, blocks: Tensor, params: Params) -> Tensor:
        vectors = self._vectors(blocks)
        codes = torch.empty(vectors.shape[:3], dtype=code_dtype(self), device=blocks.device)
        for block in range(blocks.shape[1]):
            points, code, base = vectors[:, block].reshape(-1, self.length), torch.tensor(0), 0
            exist, points = ~points.isnan(), points.nan_to_num(0.0)
            worth = None if bool(exist.all()) else exist.float()
            for name, bits in self.fields.items():
                book = params[name][0, block, 0].float()
                index = clusters.nearest(points, book, worth)
                points, code, base = points - book[index], code + (index << base), base + bits
            codes[:, block] = code.reshape(len(vectors), -1)
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        block = torch.arange(codes.shape[1], device=codes.device)[:, None]
        values, rest = torch.zeros((), device=codes.device), codes.long()
        for name, bits in self.fields.items():
            values = params[name][0, :, 0].float()[block, rest & ((1 << bits) - 1)] + values
            rest = rest >> bits
        return values.reshape(*codes.shape[:2], -1)

    def vectors_of(self, length: int, bits: int, residual: int = 0) -> Vector:
        return sized(length, bits, residual)

    def physical(self, params: Params) -> Vectors:
        books = tuple(params[name][0, :, 0].float() for name in self.fields)
        return Vectors(books, tuple(self.fields.values()))

    def _vectors(self, blocks: Tensor) -> Tensor:
        """(rows, blocks, block) -> (rows, blocks, vectors, length)."""
        return blocks.reshape(*blocks.shape[:2], -1, self.length)


def sized(length: int, bits: int, residual: int = 0, block: int = 0) -> Vector:
    """Vectors that there are.

    Raises:
        SpecError: a number is out of range.
    """
    known = length in LENGTHS and all(LEAST_BITS <= n <= MOST_BITS for n in (bits, residual or bits))
    if not known or bits + residual > MOST_CODE:
        raise SpecError(
            f"vectors of {length} weights by indices of {bits} and {residual} bits",
            f"weights are {', '.join(map(str, LENGTHS))}, bits {LEAST_BITS} to {MOST_BITS}, at most {MOST_CODE} in all",
            "for example vector8x12 or vector8x12+8",
        )
    return Vector(length, bits, residual, block)


def _shared(books: Tensor, rows: int) -> Tensor:
    """(blocks, entries, length) -> (rows, blocks, 1, entries, length), a view."""
    return books[None, :, None].expand(rows, -1, -1, -1, -1)
