# SPDX-License-Identifier: Apache-2.0
"""NanoQuant: a weight as a product of two matrices of signs, under scales, of the rank that the bits allow.

``W_hat = diag(s1) U diag(l) V^T diag(s2)``, U and V of signs. After Chong et al. 2026, arXiv:2602.06694, the factors
come from ADMM on ``T = D_out^1/2 W D_in^1/2`` (D_in: E[x^2]; D_out: the mean square gradient of each output)::

    U = (T V + rho (Z - L)) (V^T V + (rho + reg) I)^-1,     Z = SVID(U + L),  L = L + U - Z,     V likewise

where ``SVID(X) = sign(X) a b^T``, a b^T being the leading singular pair of |X|. What Z holds in the end is where this
starts: then signs and scales are improved in turn, each with all others fixed, which never loses::

    one sign after the other     u_k = sign((T A^T)_k / p - sum_{j != k} u_j (A A^T)_jk),    A = diag(l) V^T diag(q)
    s1, l, s2                    by least squares

Where we depart from the authors' code:

* l, from LittleBit (Lee et al. 2025, arXiv:2506.13771), is kept; it takes 16 bits a rank;
* the second half, after ADMM, is ours;
* of facts without gradients at the outputs, the row means of the Fisher diagonal stand for D_out;
* neither block nor model is trained with it: the tuning ``scales`` learns the scales of a block;
* ranks are whole bytes.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fewbit.core import float16, given
from fewbit.core.defaults import exact
from fewbit.core.facts import Facts
from fewbit.core.format import Format
from fewbit.core.method import Parts
from fewbit.core.sums import all_finite
from fewbit.core.terms import Product, Terms
from fewbit.errors import SpecError, UnsupportedError
from fewbit.methods import objective, signs

SHRINK, CLIP = 0.2, 0.999
"""How far D_in and D_out are drawn to their means, and the quantile that they are cut off at."""
PENALTY, REGULAR = (0.1, 1.0), 0.03
"""First and last rho, and reg, in parts of the mean of the diagonal of V^T V."""
ENOUGH = 1e-4
"""Part of a weight that is not worth factors of its own: less than the scales' rounding to float16."""
POWER = 5
"""Steps for a leading singular pair."""


@exact()
def nanoquant(
    weight: Tensor, format: Format, facts: Facts, *, bits: float = 1.0, iterations: int = 100, rounds: int = 10
) -> Terms:
    """Quantize ``weight`` (rows, columns) to a product of signs.

    Args:
        weight: float, (rows, columns).
        format: signs under one scale a row (``sign/channel``).
        facts: with E[x^2] and the Fisher diagonal. Without any token all weights count alike.
        bits: true bits a weight, at most.
        iterations: of ADMM. rounds: how often signs and scales are improved after that.

    Raises:
        InputError: the weight or the facts cannot be used. SpecError: an option is out of range.
        UnsupportedError: a row of ``format`` is not signs under one scale.
    """
    objective.check("nanoquant", weight, format, facts)
    if (reason := signs.refuse_groups(format)) is not None:
        raise UnsupportedError(f"nanoquant to {format.name}", reason, "sign/channel would work")
    if iterations < 1 or rounds < 0:
        asked = f"nanoquant with iterations={iterations}, rounds={rounds}"
        raise SpecError(asked, "out of range", "100 and 10 are usual")
    rows, columns = weight.shape
    out, into = preconditioners(facts, rows)
    target = out[:, None] * weight.double() * into
    size = target.square().mean().sqrt().clamp_min(1e-30)
    factors = Factors.start((target / size).float(), rank(rows, columns, bits), iterations)
    lost = factors.error()
    for _ in range(rounds):
        better = copy.copy(factors)  # whose arrays are replaced, never written
        better.improve()
        if not better.error() < lost:  # also catches NaN
            break
        factors, lost = better, better.error()
    left, middle, right = factors.p * size / out, factors.middle, factors.q / into
    scale = right.abs().mean().clamp_min(1e-30)
    middle, right = middle * scale, right / scale
    scale = middle.abs().mean().clamp_min(1e-30)
    product = Product(
        signs.matrix(format, factors.u > 0, (left * scale)[:, None]),
        None,
        signs.matrix(format, factors.v.T > 0, (middle / scale)[:, None]),
    )
    return Terms((rows, columns), (product,), None, float16.of(right))


def rank(rows: int, columns: int, bits: float) -> int:
    """The largest rank, of whole bytes, at which the product takes ``bits`` a weight or less; 8 where even that takes
    more.

    Raises:
        SpecError: bits are out of range.
    """
    if not (given.number(bits) and 0 < bits <= 8):
        raise SpecError(f"nanoquant to bits={bits!r}", "out of range", "more than 0 up to 8 bits, e.g. 1.0")
    most = (bits * rows * columns - 16 * (rows + columns)) / (rows + 8 * -(-columns // 8) + 16)
    return max(8, int(most) // 8 * 8)


def parts(format: Format, shape: tuple[int, int], *, bits: float, **options: int) -> Parts:
    """Both factors, and a scale a column."""
    (rows, columns), inner = shape, rank(*shape, bits)
    return Parts(((format, (rows, inner)), (format, (inner, columns))), 2 * columns)


def preconditioners(facts: Facts, rows: int) -> tuple[Tensor, Tensor]:
    """``D_out^1/2`` (rows,) and ``D_in^1/2`` (columns,), float64, of mean square 1 before they are cut and drawn in."""
    into = _tamed(facts.mean_square.double())
    out = torch.ones(rows) if facts.output_square is None or not facts.tokens else facts.output_square
    return _tamed(out.double()), into


def _tamed(worth: Tensor) -> Tensor:
    worth = worth / worth.mean() if bool((worth > 0).any()) else torch.ones_like(worth)
    worth = worth.clamp_max(float(worth.quantile(CLIP)) or torch.inf)
    return ((1 - SHRINK) * worth + SHRINK).sqrt()


class Factors:
    """``diag(p) u diag(middle) v^T diag(q)``, which stands for ``target`` (rows, columns); u (rows, rank) and v
    (columns, rank) are of ones with signs, the scales float32."""

    def __init__(self, target: Tensor, u: Tensor, v: Tensor, p: Tensor, middle: Tensor, q: Tensor) -> None:
        self.target, self.u, self.v, self.p, self.middle, self.q = target, u, v, p, middle, q

    @staticmethod
    def start(target: Tensor, rank: int, iterations: int) -> Factors:
        """From ADMM; see the module. What is missing then has factors of its own where ``rank`` is more than the rank
        that a matrix of that shape can have, and the same p and q."""
        found = Factors.admm(target, min(rank, *target.shape), iterations)
        if rank <= min(target.shape):
            return found
        found.improve()
        left, missing = rank - min(target.shape), target - found.product()
        if float(missing.norm()) <= ENOUGH * float(target.norm()):
            u, v = (torch.cat([side, torch.ones(len(side), left)], 1) for side in (found.u, found.v))
            return Factors(target, u, v, found.p, torch.cat([found.middle, torch.zeros(left)]), found.q)
        more = Factors.start(missing, left, iterations)
        middle = more.middle * (more.p.mean() * more.q.mean() / (found.p.mean() * found.q.mean()).clamp_min(1e-30))
        u, v = torch.cat([found.u, more.u], 1), torch.cat([found.v, more.v], 1)
        return Factors(target, u, v, found.p, torch.cat([found.middle, middle]), found.q)

    @staticmethod
    def admm(target: Tensor, rank: int, iterations: int) -> Factors:
        """Of a ``rank`` that a matrix of that shape can have."""
        left, values, right = torch.linalg.svd(target, full_matrices=False)
        root = values[:rank].sqrt()
        sides = [left[:, :rank] * root, right[:rank].T * root]
        held = [_rank_one(side) for side in sides]
        owed = [torch.zeros_like(side) for side in sides]
        for step in range(iterations):
            share = PENALTY[0] + (PENALTY[1] - PENALTY[0]) * step / max(1, iterations - 1)
            for one, matrix in ((0, target), (1, target.T)):
                other = sides[1 - one]
                gram = other.T @ other
                unit = float(gram.diagonal().mean()) or 1.0
                asked = matrix @ other + share * unit * (held[one] - owed[one])
                gram.diagonal().add_((share + REGULAR) * unit)
                sides[one] = torch.linalg.solve(gram, asked.T).T
                held[one] = _rank_one(sides[one] + owed[one])
                owed[one] = owed[one] + sides[one] - held[one]
        (p, above), (q, below) = (_leading(side.abs()) for side in held)
        u, v = (torch.where(side > 0, 1.0, -1.0) for side in held)
        return Factors(target, u, v, p, above * below, q)

    def improve(self) -> None:
        """Signs and scales once each; the squared error never grows, but for rounding."""
        self.u, self.p = _side(self.target, self.u, self.p, self.v * self.middle * self.q[:, None])
        self.v, self.q = _side(self.target.T, self.v, self.q, self.u * self.middle * self.p[:, None])
        u, v = self.u * self.p[:, None], self.v * self.q[:, None]
        gram = ((u.T @ u) * (v.T @ v)).double()
        gram.diagonal().add_(1e-9 * gram.diagonal().mean() + 1e-300)
        middle = torch.linalg.solve(gram, ((self.target @ v) * u).sum(0).double()).float()
        if all_finite(middle):  # equal ranks have no one solution
            self.v, self.middle = torch.where(middle < 0, -self.v, self.v), middle.abs()

    def product(self) -> Tensor:
        return (self.u * self.middle * self.p[:, None]) @ (self.v * self.q[:, None]).T

    def error(self) -> float:
        """Squared error."""
        return float((self.target - self.product()).square().sum(dtype=torch.float64))


def _side(target: Tensor, u: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Signs (rows, rank) and scales (rows,) that bring ``diag(p) u a^T`` nearer to ``target`` (rows, columns)."""
    gram, wanted = a.T @ a, target @ a
    u = torch.where(p[:, None] < 0, -u, u)
    p, made = p.abs()[:, None], u @ gram
    u = u.clone()
    for k in range(u.shape[1]):
        rest = wanted[:, k] - (made[:, k] - gram[k, k] * u[:, k]) * p[:, 0]
        sign = torch.where(rest > 0, 1.0, -1.0)
        made.addr_(sign - u[:, k], gram[k])
        u[:, k] = sign
    power = (made * u).sum(1)
    found = (wanted * u).sum(1) / power.clamp_min(1e-30)
    return torch.where(found[:, None] < 0, -u, u), found.abs()


def _leading(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` (rows,) and ``b`` (rank,), b of norm 1: nearly the leading singular pair of ``magnitude``."""
    b = magnitude.mean(0)
    for _ in range(POWER):
        a = magnitude @ b
        b = magnitude.T @ a
        b = b / b.norm().clamp_min(1e-30)
    return magnitude @ b, b


def _rank_one(x: Tensor) -> Tensor:
    """SVID of ``x``."""
    a, b = _leading(x.abs())
    return torch.where(x > 0, 1.0, -1.0) * a[:, None] * b
