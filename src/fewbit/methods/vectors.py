# SPDX-License-Identifier: Apache-2.0
"""Learned vectors: which entries a matrix takes, and what they are, on the output of the block.

What VPTQ (Liu et al. 2024, arXiv:2409.17066) tunes after its codes are chosen are books under fixed codes: the tuning
``books``, which is :class:`fewbit.methods.scales.Scales` for formats of vectors. The tuning ``vectors`` learns codes as
well, as ``rounding`` does for grids: each weight moves by V, and whatever is nearest then is taken::

    w_hat = nearest vector of (w + V step),   books = float16(b + r unit),   |V|, |r| <= 1/2

``step`` is that of an even grid that would lose as much, ``unit`` the root mean square of a book; gradients go straight
through the choice, to V as they are and to each entry as the sum over the vectors that take it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.tuning import Learnable, Values
from fewbit.methods import codebooks as K

FAR = 0.5
BEAM = 8
BACK = (1.0, 0.75, 0.5, 0.25)
"""Shares of the way from a weight's vector back to the weight that are tried, most first."""


def refuse(format: Format) -> str | None:
    """None, or why ``format`` has no codebook of vectors."""
    return None if format.height > 1 else "it has no codebook of vectors"


def books_rate(iters: int, format: Format) -> float:
    """Of the root mean square of a book, for books under fixed codes."""
    return 4e-3


def rate(iters: int, format: Format) -> float:
    """Of a step, and of the root mean square of a book."""
    return 1 / max(1, iters)


class Vectors(Learnable):
    """``offset`` is V, as (columns, vectors, length); the others are r of the book of that name."""

    def __init__(self, weight: Tensor, qtensor: QTensor) -> None:
        self._format, self._rows = qtensor.format, qtensor.shape[0]
        coded = K.Coded.of(qtensor)
        self._coded, self._books = coded, coded.books
        self._names = [param.name for param in self._format.params]
        shape = (*coded.indices[0].shape, self._format.height)
        high = torch.constant_pad_nd(weight.float(), (0, 0, 0, -self._rows % self._format.height))
        chosen, wanted = coded.decode().view(shape), high.T.reshape(shape)
        self._weight = self._near(chosen, wanted)
        lost = (K.all_nearest(wanted, self._books, coded.width, BEAM).decode().view(shape) - wanted).square().mean()
        self._step = float(12 * lost) ** 0.5
        self._unit = [book.square().mean().sqrt().clamp_min(2.0**-24) for book in self._books]
        self.start = {"offset": torch.zeros_like(self._weight)}
        self.start |= {name: torch.zeros_like(book) for name, book in zip(self._names, self._books, strict=True)}
        self.bounds = dict.fromkeys(self.start, (-FAR, FAR))

    def _near(self, chosen: Tensor, wanted: Tensor) -> Tensor:
        """As near to ``wanted`` (columns, vectors, length) as the codes stay what they are."""
        coded = self._coded
        found, done = chosen.clone(), torch.zeros(chosen.shape[:2], dtype=torch.bool, device=chosen.device)
        for share in BACK:
            tried = chosen + share * (wanted - chosen)
            again = K.all_nearest(tried, self._books, coded.width, BEAM, coded).indices
            same = torch.stack([a == b for a, b in zip(again, coded.indices, strict=True)]).all(0) & ~done
            found[same], done = tried[same], done | same
        return found

    def _choose(self, values: Values) -> K.Coded:
        parts = zip(self._names, self._books, self._unit, strict=True)
        books = tuple(K.stored(book + values[name] * unit) for name, book, unit in parts)
        return K.all_nearest(self._weight + values["offset"] * self._step, books, self._coded.width, BEAM, self._coded)

    def weight(self, values: Values) -> Tensor:
        return self._choose(values).decode().T[: self._rows]

    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        coded, length = self._choose(values), self._format.height
        high = torch.constant_pad_nd(grad, (0, 0, 0, -self._rows % length)).T.reshape(self._weight.shape)
        found = {"offset": high * self._step}
        for name, pulled, book, unit in zip(self._names, coded.taken(high), coded.books, self._unit, strict=True):
            found[name] = pulled.float().view(book.shape) * unit
        return found

    def freeze(self, values: Values) -> QTensor:
        return self._choose(values).qtensor(self._format, self._rows)
