# SPDX-License-Identifier: Apache-2.0
"""What sums of terms learn: every matrix in them what it would learn alone, and scales of rows, columns and ranks.

With all codes fixed (``learned``) a matrix learns what :class:`fewbit.methods.scales.Scales` says, with vectors chosen
again (``chosen``) what :class:`fewbit.methods.vectors.Vectors` says. Other scales move as arrays of the former do, in
the latter case by a quarter. Sparse entries stand still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.sums import all_finite
from fewbit.core.terms import Columns, Dense, Product, Sparse, Term, Terms
from fewbit.core.tuning import Learnable, Values
from fewbit.methods import scales, vectors
from fewbit.methods.scales import FAR, Scales, unit
from fewbit.methods.vectors import Vectors

Path = tuple[str, ...]

SHARE = 0.25
"""Of its own unit, that of a scale beside vectors that are chosen again: whole ones, stepped by signs, lose on some
blocks (figures in ``docs/methods/vptq.md``)."""


def learned(weight: Tensor, made: QTensor | Terms) -> Learnable:
    """What of ``made`` can be learned under fixed codes."""
    return Scales(weight, made) if isinstance(made, QTensor) else Sum(weight, made, Scales, scales.refuse)


def chosen(weight: Tensor, made: QTensor | Terms) -> Learnable:
    """What of ``made`` can be learned where vectors are chosen again."""
    return Vectors(weight, made) if isinstance(made, QTensor) else Sum(weight, made, Vectors, vectors.refuse, SHARE)


class Sum(Learnable):
    """Each value is that of an array of a matrix, or of a scale, called by the way to it: ``1.left.scale`` is that of
    the left factor of the second term.

    ``one(weight, matrix)`` is what a matrix learns that ``refuse(format)`` lets pass; ``share`` of its own unit is that
    of what scales rows, columns and ranks.
    """

    def __init__(
        self,
        weight: Tensor,
        made: Terms,
        one: Callable[[Tensor, QTensor], Learnable],
        refuse: Callable[[Format], str | None],
        share: float = 1.0,
    ) -> None:
        self._made = made
        self._matrices: dict[Path, Learnable] = {}
        self._fixed: dict[Path, Tensor] = {}
        self._scales: dict[Path, Tensor] = {}
        for path, leaf, wanted in _leaves(made, (), weight):
            if isinstance(leaf, Tensor):
                self._scales[path] = leaf
            elif refuse(leaf.format) is None:
                self._matrices[path] = one(leaf.dequantize() if wanted is None else wanted, leaf)
            else:
                self._fixed[path] = leaf.dequantize()
        self._unit = {path: share * unit(scale.float()) for path, scale in self._scales.items()}
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
        moved = {**self._fixed, **self._moved(values)}

        def matrix(path: Path, before: QTensor) -> QTensor:
            made = self._matrices[path].freeze(self._of(path, values)) if path in self._matrices else before
            assert isinstance(made, QTensor)
            return made

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


def _leaves(term: Term, path: Path, wanted: Tensor | None) -> Iterator[tuple[Path, QTensor | Tensor, Tensor | None]]:
    """Every matrix and every scale in ``term``, and what of the float weight ``wanted`` it alone stands for: None where
    it is a factor, or one of several terms. Under scales that is what the weight is without them."""
    match term:
        case Dense():
            yield path, term.qtensor, wanted
        case Product():
            yield (*path, "left"), term.left, None
            yield (*path, "right"), term.right, None
            if term.middle is not None:
                yield (*path, "middle"), term.middle, None
        case Columns():
            widths = [part.shape[1] for part in term.parts]
            own = None if wanted is None else wanted[:, term.permutation.long()].split(widths, 1)
            for i, part in enumerate(term.parts):
                yield from _leaves(part, (*path, str(i)), None if own is None else own[i])
        case Terms():
            scales = (("row_scale", term.row_scale), ("column_scale", term.column_scale))
            own = None if wanted is None or len(term.terms) > 1 else _without(wanted, term)
            for i, part in enumerate(term.terms):
                yield from _leaves(part, (*path, str(i)), own)
            for name, scale in scales:
                if scale is not None:
                    yield (*path, name), scale, None


def _without(wanted: Tensor, term: Terms) -> Tensor | None:
    """What stands for ``wanted`` under the scales of ``term``; None where one of them is zero."""
    for scale, axis in ((term.row_scale, 1), (term.column_scale, 0)):
        if scale is not None:
            wanted = wanted / scale.float().unsqueeze(axis)
    return wanted if all_finite(wanted) else None


def _assembled(term: Term, path: Path, leaves: Mapping[Path, Tensor]) -> Tensor:
    """What ``term`` decodes to with ``leaves`` for its matrices and scales, in the very steps of its own."""

    def scale(name: str) -> Tensor | None:
        found = leaves.get((*path, name))
        return None if found is None else found.float()

    match term:
        case Dense():
            return leaves[path]
        case Product():
            left, right = (leaves[at] for at in ((*path, "left"), (*path, "right")))
            middle = scale("middle")
            return (left if middle is None else left * middle) @ right
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
