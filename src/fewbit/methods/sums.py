# SPDX-License-Identifier: Apache-2.0
"""Learned scales of sums of terms, all codes fixed: those of every matrix in them, and of rows, columns and ranks.

What a matrix may learn is what :class:`fewbit.methods.scales.Scales` says; other scales move as its arrays do. Sparse
entries stand still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.core.qtensor import QTensor
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.core.tuning import Learnable, Values
from fewbit.methods.scales import FAR, Scales, refuse, unit

Path = tuple[str, ...]


def learned(weight: Tensor, made: QTensor | Terms) -> Learnable:
    """What of ``made`` can be learned under fixed codes."""
    return Scales(weight, made) if isinstance(made, QTensor) else SumScales(weight, made)


class SumScales(Learnable):
    """Each value is that of an array of a matrix, or of a scale, called by the way to it: ``1.left.scale`` is that of
    the left factor of the second term."""

    def __init__(self, weight: Tensor, made: Terms) -> None:
        self._made = made
        parts = dict(_leaves(made, ()))
        self._matrices = {
            path: Scales(weight, leaf)
            for path, leaf in parts.items()
            if isinstance(leaf, QTensor) and refuse(leaf.format) is None
        }
        self._fixed = {
            path: leaf.dequantize()
            for path, leaf in parts.items()
            if isinstance(leaf, QTensor) and path not in self._matrices
        }
        self._scales = {path: leaf for path, leaf in parts.items() if isinstance(leaf, Tensor)}
        self._unit = {path: unit(scale.float()) for path, scale in self._scales.items()}
        self.start = {_name(path, key): a for path, one in self._matrices.items() for key, a in one.start.items()}
        self.start |= {_name(path): torch.zeros_like(step) for path, step in self._unit.items()}
        self.bounds = dict.fromkeys(self.start, (-FAR, FAR))

    def _of(self, path: Path, values: Values) -> dict[str, Tensor]:
        """The values of the matrix at ``path``."""
        return {key: values[_name(path, key)] for key in self._matrices[path].start}

    def _moved(self, values: Values) -> dict[Path, Tensor]:
        """The scales as they are stored."""
        return {
            path: (scale.float() + values[_name(path)] * self._unit[path])
            .clamp(-torch.finfo(scale.dtype).max, torch.finfo(scale.dtype).max)
            .to(scale.dtype)
            for path, scale in self._scales.items()
        }

    def weight(self, values: Values) -> Tensor:
        leaves = {path: one.weight(self._of(path, values)) for path, one in self._matrices.items()}
        return _assembled(self._made, (), {**self._fixed, **leaves, **self._moved(values)})

    def gradient(self, values: Values, grad: Tensor) -> dict[str, Tensor]:
        leaves = {path: one.weight(self._of(path, values)) for path, one in self._matrices.items()}
        leaves |= {path: moved.float() for path, moved in self._moved(values).items()}
        with torch.enable_grad():
            leaves = {path: leaf.detach().requires_grad_() for path, leaf in leaves.items()}
            whole = _assembled(self._made, (), {**self._fixed, **leaves})
            found = dict(zip(leaves, torch.autograd.grad(whole, list(leaves.values()), grad), strict=True))
        result = {_name(path): found[path] * self._unit[path] for path in self._scales}
        for path, one in self._matrices.items():
            result |= {_name(path, key): g for key, g in one.gradient(self._of(path, values), found[path]).items()}
        return result

    def freeze(self, values: Values) -> Terms:
        moved = self._moved(values)

        def matrix(path: Path, before: QTensor) -> QTensor:
            return self._matrices[path].freeze(self._of(path, values)) if path in self._matrices else before

        def each(term: Term, path: Path) -> Term:
            match term:
                case Dense():
                    return Dense(matrix(path, term.qtensor))
                case Product():
                    left, right = matrix((*path, "left"), term.left), matrix((*path, "right"), term.right)
                    return Product(left, moved.get((*path, "middle")), right)
                case Columns():
                    return replace(term, parts=tuple(each(part, (*path, str(i))) for i, part in enumerate(term.parts)))
                case Terms():
                    return total(term, path)
            return term

        def total(terms: Terms, path: Path) -> Terms:
            inner = tuple(each(term, (*path, str(i))) for i, term in enumerate(terms.terms))
            return Terms(terms.shape, inner, moved.get((*path, "row_scale")), moved.get((*path, "column_scale")))

        return total(self._made, ())


def _name(path: Path, *more: str) -> str:
    return ".".join((*path, *more))


def _at(path: Path, *more: str) -> Path:
    return (*path, *more)


def _leaves(term: Term, path: Path) -> Iterator[tuple[Path, QTensor | Tensor]]:
    """Every matrix and every scale in ``term``."""
    match term:
        case Dense():
            yield path, term.qtensor
        case Product():
            yield (*path, "left"), term.left
            yield (*path, "right"), term.right
            if term.middle is not None:
                yield (*path, "middle"), term.middle
        case Columns():
            for i, part in enumerate(term.parts):
                yield from _leaves(part, (*path, str(i)))
        case Terms():
            for i, part in enumerate(term.terms):
                yield from _leaves(part, (*path, str(i)))
            for name, scale in (("row_scale", term.row_scale), ("column_scale", term.column_scale)):
                if scale is not None:
                    yield (*path, name), scale


def _assembled(term: Term, path: Path, leaves: Mapping[Path, Tensor]) -> Tensor:
    """What ``term`` decodes to with ``leaves`` for its matrices and scales, in the very steps of its own."""

    def scale(name: str) -> Tensor | None:
        found = leaves.get((*path, name))
        return None if found is None else found.float()

    match term:
        case Dense():
            return leaves[path]
        case Product():
            left, middle = leaves[_at(path, "left")], scale("middle")
            return (left if middle is None else left * middle) @ leaves[_at(path, "right")]
        case Columns():
            parts = [_assembled(part, (*path, str(i)), leaves) for i, part in enumerate(term.parts)]
            return torch.cat(parts, 1)[:, torch.argsort(term.permutation.long())]
        case Sparse():
            return term.dequantize()
        case Terms():
            weight = _assembled(term.terms[0], (*path, "0"), leaves)
            for i, part in enumerate(term.terms[1:], 1):
                weight = weight + _assembled(part, (*path, str(i)), leaves)
            if (rows := scale("row_scale")) is not None:
                weight = weight * rows[:, None]
            return weight if (columns := scale("column_scale")) is None else weight * columns
    raise TypeError(f"{type(term).__name__} is no term")
