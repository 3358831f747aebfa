# SPDX-License-Identifier: Apache-2.0
r"""A matrix in vectors of codebooks, on the way to its codes and books: choosing, decoding, refitting.

Vector u of column k is ``w[length u + d, k] = sum over books b of b[k // width, index_b[k, u], d]``. Columns are the
first axis of everything here: they are what is worked on one after the other. A weight is one such matrix or several
side by side (``Sides``), the columns of each after those of the one before. ``worth``, (rows,), is what the square of
an error counts in each row; None for 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.core import blocks as B
from fewbit.core import clusters, float16
from fewbit.core.format import Format, code_dtype
from fewbit.core.qtensor import QTensor

ROUNDING = torch.finfo(torch.float32).eps
"""Of products with a second moment."""


@dataclass(frozen=True, eq=False)
class Coded:
    """``books``: float32 (groups, entries, length) of float16 values; ``indices``: int64 (columns, vectors) into them,
    one a book; ``width``: columns of a group."""

    books: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    width: int

    @staticmethod
    def of(qtensor: QTensor) -> Coded:
        """What an unpacked ``qtensor`` holds."""
        format, (codes, params) = qtensor.format, qtensor.logical()
        rest, books, indices = codes.T.long(), list[Tensor](), list[Tensor]()
        for param in format.params:
            books.append(params[param.name][0, :, 0].float())
            indices.append(rest % param.entry[0])
            rest = rest // param.entry[0]
        return Coded(tuple(books), tuple(indices), B.width(qtensor.shape[1], format.block))

    def places(self) -> list[Tensor]:
        """Indices, by book, into all entries of all groups."""
        group = torch.arange(len(self.indices[0]), device=self.indices[0].device) // self.width
        return [index + group[:, None] * book.shape[1] for book, index in zip(self.books, self.indices, strict=True)]

    def decode(self) -> Tensor:
        """What this stands for, transposed: float32 (columns, rows)."""
        parts = [book.flatten(0, 1)[place] for book, place in zip(self.books, self.places(), strict=True)]
        return sum(parts[1:], parts[0]).flatten(1)

    def taken(self, worth: Tensor) -> list[Tensor]:
        """By book, the sum of ``worth`` (columns, vectors, n) over the vectors that take each entry: float64 (entries
        of all groups, n)."""
        flat = worth.double().flatten(0, 1).T.contiguous()
        return [
            torch.stack([torch.bincount(place.flatten(), one, book.shape[0] * book.shape[1]) for one in flat], 1)
            for place, book in zip(self.places(), self.books, strict=True)
        ]

    def qtensor(self, format: Format, rows: int) -> QTensor:
        """Codes and parameters of ``format``, of a matrix of ``rows``; vectors past these are left out."""
        whole = -(-rows // format.height)
        codes, base = torch.zeros_like(self.indices[0][:, :whole]), 0
        params = {}
        for param, book, index in zip(format.params, self.books, self.indices, strict=True):
            codes += index[:, :whole] << base
            base += param.entry[0].bit_length() - 1
            params[param.name] = book.to(param.dtype)[None, :, None].expand(whole, -1, -1, -1, -1)
        return QTensor.of(format, codes.T.contiguous().to(code_dtype(format)), params, rows)


Sides = tuple[Coded, ...]


class Choice:
    """Vectors of one column after another, each to the nearest sum of one entry a book.

    ``beam``: see :func:`nearest`; ``present``: what was chosen before; ``worth``: see the module. ``seen``: (columns,
    vectors, length), what each column was to be when it had its turn.
    """

    def __init__(
        self,
        books: tuple[Tensor, ...],
        shape: tuple[int, int],
        width: int,
        beam: int,
        present: Coded | None = None,
        worth: Tensor | None = None,
    ) -> None:
        columns, self._length = shape[0], books[0].shape[2]
        self._books, self._width, self._beam, self._present = books, width, beam, present
        self._worth = None if worth is None else worth.view(-1, self._length)
        self.seen = torch.empty(columns, shape[1] // self._length, self._length)
        self._indices = tuple(torch.empty(self.seen.shape[:2], dtype=torch.int64) for _ in books)

    def __call__(self, column: int, values: Tensor) -> Tensor:
        """Choose for ``values`` (rows,) of ``column``; what they become."""
        books = [book[column // self._width] for book in self._books]
        points = values.view(-1, self._length)
        self.seen[column] = points
        present = None if self._present is None else [index[column] for index in self._present.indices]
        picked = nearest(points, books, self._beam, present, self._worth)
        for index, chosen in zip(self._indices, picked, strict=True):
            index[column] = chosen
        parts = [book[index] for book, index in zip(books, picked, strict=True)]
        return sum(parts[1:], parts[0]).flatten()

    def coded(self) -> Coded:
        """What was chosen."""
        return Coded(self._books, self._indices, self._width)


class Beside:
    """The columns of matrices side by side, one after another, each by the choice of its own matrix."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = choices
        self._of = [(choice, own) for choice in choices for own in range(len(choice.seen))]

    def __call__(self, column: int, values: Tensor) -> Tensor:
        choice, own = self._of[column]
        return choice(own, values)

    def coded(self) -> Sides:
        return tuple(choice.coded() for choice in self.choices)


def nearest(
    points: Tensor,
    books: list[Tensor],
    beam: int,
    present: list[Tensor] | None = None,
    worth: Tensor | None = None,
) -> list[Tensor]:
    """Indices, by book, of the sum nearest to each of ``points`` (n, length): at most two books (entries, length).

    Of two books the ``beam`` nearest entries of the first are tried, each with the nearest of the second to what it
    leaves; and the sums of the indices ``present``, which win ties.
    ``worth``: (n, length), what each square in a distance counts; None for 1.
    """
    if len(books) == 1:
        return [clusters.nearest(points, books[0], worth)]
    first, second = books
    wide = first.double()
    if worth is None:
        far, share = torch.addmm(wide.square().sum(1) / 2, points.double(), wide.T, alpha=-1), None
    else:
        far, share = clusters.weighed(points, first, worth), worth.repeat_interleave(min(beam, len(first)), 0)
    tried = far.topk(min(beam, len(first)), 1, largest=False).indices if beam > 1 else far.argmin(1, keepdim=True)
    left = (points[:, None] - first[tried]).flatten(0, 1)
    beside = clusters.nearest(left, second, share)
    lost = _squares(left - second[beside], share).view(tried.shape)
    least, best = lost.min(1, keepdim=True)
    picked = [tried.gather(1, best).squeeze(1), beside.view(tried.shape).gather(1, best).squeeze(1)]
    if present is None:
        return picked
    stays = _squares(points - first[present[0]] - second[present[1]], worth) <= least.squeeze(1)
    return [torch.where(stays, now, then) for now, then in zip(present, picked, strict=True)]


def _squares(error: Tensor, worth: Tensor | None) -> Tensor:
    return (error.square() if worth is None else error.square() * worth).sum(1)


def all_nearest(
    points: Tensor,
    books: tuple[Tensor, ...],
    width: int,
    beam: int,
    present: Coded | None = None,
    worth: Tensor | None = None,
) -> Coded:
    """``points`` (columns, vectors, length) to the nearest sums of ``books``; see :func:`nearest`."""
    found = []
    for group, part in enumerate(points.split(width)):
        own = None if present is None else [index.split(width)[group].flatten() for index in present.indices]
        share = None if worth is None else worth.view(1, *part.shape[1:]).expand(part.shape).flatten(0, 1)
        found.append(nearest(part.flatten(0, 1), [book[group] for book in books], beam, own, share))
    indices = (torch.cat(parts).view(points.shape[:2]) for parts in zip(*found, strict=True))
    return Coded(books, tuple(indices), width)


def cluster(points: Tensor, worth: Tensor, entries: int, width: int, restarts: int) -> Tensor:
    """A book of ``entries`` for each group of ``width`` columns: float32 (groups, entries, length) of float16 values.

    Args:
        points: float32 (columns, vectors, length).
        worth: (columns, vectors), non-negative: the weight of each vector.
        restarts: of k-means; the best counts.
    """
    books = []
    for group, share in zip(points.split(width), worth.split(width), strict=True):
        generator = torch.Generator().manual_seed(0)
        # vectors of a row of codes beside each other: the order in which the format's own fit looks at them
        flat, weights = group.transpose(0, 1).flatten(0, 1), share.T.flatten()
        some, weights = clusters.sample(flat, weights, entries, generator)
        books.append(stored(clusters.best_means(some, weights, entries, generator, restarts)))
    return torch.stack(books)


def stored(book: Tensor) -> Tensor:
    """``book`` as files hold it, float32."""
    return float16.of(book).float()


def decoded(sides: Sides) -> Tensor:
    """What ``sides`` stand for, transposed: float32 (columns, rows)."""
    return torch.cat([side.decode() for side in sides])


def loss(weight: Tensor, sides: Sides, moment: Tensor, worth: Tensor | None = None) -> float:
    """``tr(E H E^T)`` of what ``sides`` make of ``weight`` (columns, rows), H = ``moment``, without the rows that fill
    up vectors."""
    error = weight - decoded(sides)[:, : weight.shape[1]]
    lost = (moment @ error) * error
    return float((lost if worth is None else lost * worth).sum(dtype=torch.float64))


def refitted(weight: Tensor, sides: Sides, moment: Tensor, steps: int, worth: Tensor | None = None) -> Sides:
    """``sides`` with books nearer to those of least ``tr(E H E^T)`` under their indices, all books at once.

    With D the linear map from books to weights, the normal equations ``D^T (D(b) H) = D^T (W H)`` are solved by
    ``steps`` conjugate gradients from the present books, preconditioned by their diagonal (entry i: the sum of H_kk
    over the vectors that use it); then books are rounded to float16. Entries that no vector uses stay. Few entries need
    fewer steps: they end where nothing is left but the rounding of products.
    """
    shapes, rows = [side.indices[0].shape for side in sides], weight.shape[1]
    whole = shapes[0][1] * sides[0].books[0].shape[2]

    def gathered(pulled: Tensor) -> list[Tensor]:
        """D^T of (columns, rows): float64 (entries of all groups, length) a book."""
        filled = torch.constant_pad_nd(pulled if worth is None else pulled * worth, (0, whole - rows))
        parts = zip(sides, filled.split([columns for columns, _ in shapes]), shapes, strict=True)
        return [sums for side, part, shape in parts for sums in side.taken(part.view(*shape, -1))]

    def shown(books: list[Tensor]) -> Sides:
        own = iter(books)
        return tuple(replace(one, books=tuple(next(own).view(book.shape) for book in one.books)) for one in sides)

    counts = torch.ones(whole) if worth is None else torch.constant_pad_nd(worth, (0, whole - rows))
    most = 1 if worth is None else whole
    diagonal = moment.diagonal().split([columns for columns, _ in shapes])
    share = [
        mass
        for side, part, shape in zip(sides, diagonal, shapes, strict=True)
        for mass in side.taken(part[:, None, None] * counts.view(1, shape[1], -1)[..., :most])
    ]
    books = [book.double().flatten(0, 1) for side in sides for book in side.books]
    rest = gathered(moment @ (weight - decoded(sides)[:, :rows]))
    way, power, floor = [torch.zeros_like(r) for r in rest], 1.0, 0.0
    for step in range(steps):
        scaled = [r / mass.clamp_min(1e-300) for r, mass in zip(rest, share, strict=True)]
        before, power = power, _dot(rest, scaled)
        floor = ROUNDING**2 * power if step == 0 else floor
        if not power > floor:
            break
        way = [s + w * (power / before if step else 0.0) for s, w in zip(scaled, way, strict=True)]
        bent = gathered(moment @ decoded(shown([w.float() for w in way]))[:, :rows])
        far = power / max(_dot(way, bent), 1e-300)
        books = [b + far * w for b, w in zip(books, way, strict=True)]
        rest = [r - far * b for r, b in zip(rest, bent, strict=True)]
    return shown([stored(b) for b in books])


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))
