# SPDX-License-Identifier: Apache-2.0
"""VPTQ's sweep as its paper defines it, and what it and its neighbours minimise, in float64 numpy and with no trick.

Liu et al. 2024 (arXiv:2409.17066): columns in order of falling E[x^2]; every vector of a column to the nearest entry of
the first book, what is left of it to the nearest of the second; then, with F the columns not yet chosen and H_F their
second moment, the update of optimal brain surgeon of all remaining columns (see :mod:`oracle.gptq_oracle`), its inverse
computed again at every step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def damped(moment: Array, fraction: float) -> Array:
    """The second moment with ``fraction`` of its mean diagonal added (no input is always zero)."""
    return moment + fraction * moment.diagonal().mean() * np.eye(len(moment))


def nearest(vector: Array, books: list[Array], worth: Array | float = 1.0) -> list[int]:
    """Greedy: index in each of ``books`` (entries, length), the lowest of equals; ``worth``: of each square."""
    found = []
    for book in books:
        index = int((worth * (book - vector) ** 2).sum(1).argmin())
        found.append(index)
        vector = vector - book[index]
    return found


def decoded(books: list[Array], indices: NDArray[np.int64], width: int) -> Array:
    """(rows, columns) from books (groups, entries, length) and indices (books, vectors, columns)."""
    _, vectors, columns = indices.shape
    length = books[0].shape[2]
    weight = np.zeros((vectors * length, columns))
    for u in range(vectors):
        for k in range(columns):
            for book, index in zip(books, indices, strict=True):
                weight[u * length : (u + 1) * length, k] += book[k // width, index[u, k]]
    return weight


def sweep(weight: Array, moment: Array, books: list[Array], width: int, damping: float) -> tuple[NDArray, Array]:
    """Indices (books, vectors, columns), and the values that each column had when its turn came, (rows, columns)."""
    length, (rows, columns) = books[0].shape[2], weight.shape
    hessian, current = damped(moment, damping), weight.copy()
    indices = np.zeros((len(books), rows // length, columns), dtype=np.int64)
    order = sorted(range(columns), key=lambda i: -moment[i, i])
    seen = np.empty_like(weight)
    for step, k in enumerate(order):
        seen[:, k] = current[:, k]
        own = [book[k // width] for book in books]
        chosen = np.empty(rows)
        for u in range(rows // length):
            part = slice(u * length, (u + 1) * length)
            indices[:, u, k] = nearest(current[part, k], own)
            chosen[part] = sum(book[i] for book, i in zip(own, indices[:, u, k], strict=True))
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        current[:, left] -= np.outer((current[:, k] - chosen) / inverse[0, 0], inverse[0])
    return indices, seen


def descent(weight: Array, hessian: Array, books: list[Array], indices: NDArray[np.int64], width: int) -> NDArray:
    """One pass over all columns, in order of falling diagonal: each vector to the sum of least ``tr(E H E^T)``, all
    sums tried, the loss worked out anew for each."""
    indices, length = indices.copy(), books[0].shape[2]
    every = list(np.ndindex(*(book.shape[1] for book in books)))
    for k in sorted(range(weight.shape[1]), key=lambda i: -hessian[i, i]):
        for u in range(indices.shape[1]):
            part = slice(u * length, (u + 1) * length)
            error = (weight - decoded(books, indices, width))[part]
            losses = []
            for pick in every:
                error[:, k] = weight[part, k] - sum(b[k // width, i] for b, i in zip(books, pick, strict=True))
                losses.append(loss(error, hessian))
            indices[:, u, k] = every[int(np.argmin(losses))]
    return indices


def loss(error: Array, hessian: Array) -> float:
    return float(np.trace(error @ hessian @ error.T))


def least_squares(weight: Array, hessian: Array, books: list[Array], indices: NDArray, width: int) -> list[Array]:
    """The books of least ``tr(E H E^T)`` under ``indices``, by a dense solve over all entries; unused ones stay."""
    _, vectors, columns = indices.shape
    length, sizes = books[0].shape[2], [book.shape[0] * book.shape[1] for book in books]
    root = np.linalg.cholesky(hessian)
    found = np.concatenate([book.reshape(-1, length) for book in books])
    design = np.zeros((vectors, columns, sum(sizes)))
    for b, (index, book) in enumerate(zip(indices, books, strict=True)):
        for u in range(vectors):
            for k in range(columns):
                design[u, k, sum(sizes[:b]) + (k // width) * book.shape[1] + index[u, k]] += 1
    used = design.any((0, 1))
    tall = np.concatenate([root.T @ one[:, used] for one in design])
    wanted = np.stack(
        [np.concatenate([root.T @ weight[u * length + d] for u in range(vectors)]) for d in range(length)], 1
    )
    present = found[used]
    found[used] = present + np.linalg.lstsq(tall, wanted - tall @ present, rcond=None)[0]
    parts = np.split(found, np.cumsum(sizes)[:-1])
    return [part.reshape(book.shape) for part, book in zip(parts, books, strict=True)]


class Side(NamedTuple):
    """Columns of a weight that have books of their own: where they lie in it, books (groups, entries, length), columns
    of a group, and indices (books, vectors, own columns)."""

    columns: list[int]
    books: list[Array]
    width: int
    indices: NDArray[np.int64]


def decoded_sides(sides: list[Side]) -> Array:
    """(rows, columns), every column where it lies."""
    parts = [decoded(side.books, side.indices, side.width) for side in sides]
    weight = np.zeros((len(parts[0]), sum(len(side.columns) for side in sides)))
    for side, part in zip(sides, parts, strict=True):
        weight[:, side.columns] = part
    return weight


def sweep_sides(
    weight: Array, moment: Array, sides: list[Side], damping: float, worth: Array | None = None
) -> list[NDArray[np.int64]]:
    """As :func:`sweep`, each column by the books of the side that it is on: indices of each side. ``worth``: (rows,),
    what the square of an error counts in each row."""
    worth = np.ones(len(weight)) if worth is None else worth
    hessian, current = damped(moment, damping), weight.copy()
    found = [np.zeros_like(side.indices) for side in sides]
    order = sorted(range(weight.shape[1]), key=lambda i: -moment[i, i])
    for step, k in enumerate(order):
        one = next(i for i, side in enumerate(sides) if k in side.columns)
        own = sides[one].columns.index(k)
        books, chosen = [book[own // sides[one].width] for book in sides[one].books], []
        for u, vector in enumerate(current[:, k].reshape(-1, books[0].shape[1])):
            found[one][:, u, own] = nearest(vector, books, worth.reshape(-1, len(vector))[u])
            chosen.append(sum(book[i] for book, i in zip(books, found[one][:, u, own], strict=True)))
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        current[:, left] -= np.outer((current[:, k] - np.concatenate(chosen)) / inverse[0, 0], inverse[0])
    return found


def descent_sides(
    weight: Array, hessian: Array, sides: list[Side], worth: Array | None = None
) -> list[NDArray[np.int64]]:
    """As :func:`descent`, of all sides: indices of each; ``worth`` as of :func:`sweep_sides`."""
    root = np.ones((len(weight), 1)) if worth is None else np.sqrt(worth)[:, None]
    sides = [side._replace(indices=side.indices.copy()) for side in sides]
    for k in sorted(range(weight.shape[1]), key=lambda i: -hessian[i, i]):
        side = next(side for side in sides if k in side.columns)
        own, length = side.columns.index(k), side.books[0].shape[2]
        books = [book[own // side.width] for book in side.books]
        for u in range(side.indices.shape[1]):
            part, losses = slice(u * length, (u + 1) * length), {}
            error = (weight - decoded_sides(sides))[part]
            for pick in np.ndindex(*map(len, books)):
                error[:, k] = weight[part, k] - sum(book[i] for book, i in zip(books, pick, strict=True))
                losses[pick] = loss(root[part] * error, hessian)
            side.indices[:, u, own] = min(losses, key=losses.__getitem__)
    return [side.indices for side in sides]


def least_squares_sides(weight: Array, hessian: Array, sides: list[Side], worth: Array | None = None) -> float:
    """The least ``tr(E H E^T)`` under the indices of all ``sides``, by a dense solve over all numbers of all books."""
    (rows, columns), numbers = weight.shape, [book.size for side in sides for book in side.books]
    design, first = np.zeros((rows, columns, sum(numbers))), 0
    for side in sides:
        for book, index in zip(side.books, side.indices, strict=True):
            places = first + np.arange(book.size).reshape(book.shape)
            for own, k in enumerate(side.columns):
                for row in range(rows):
                    vector, at = divmod(row, book.shape[2])
                    design[row, k, places[own // side.width, index[vector, own], at]] += 1
            first += book.size
    if worth is not None:
        weight, design = weight * np.sqrt(worth)[:, None], design * np.sqrt(worth)[:, None, None]
    root = np.linalg.cholesky(hessian)
    tall, wanted = np.concatenate([root.T @ one for one in design]), np.concatenate([root.T @ row for row in weight])
    return float(((wanted - tall @ np.linalg.lstsq(tall, wanted, rcond=None)[0]) ** 2).sum())
