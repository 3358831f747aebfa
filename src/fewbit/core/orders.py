# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices of orders that are no power of two: entries +-1, ``H H^T = order I``.

Paley 1933 (On orthogonal matrices), from the quadratic character chi of the field of q elements, q a power of an odd
prime; Q is the matrix chi(a - b) over its elements, a and b::

    q = 3 mod 4, order q + 1:       H = I + [[0, 1], [-1, Q]]
    q = 1 mod 4, order 2 (q + 1):   H = C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],   C = [[0, 1], [1, Q]]

with x the Kronecker product; columns of the latter change sign so that the first row is ones, as Sylvester's. A width
n = K 2^m has the matrix of order K times Sylvester's of order 2^m, by another Kronecker product. K = 156 and 172 are in
neither family, 312 and 344 are: of the widths with these odd parts only 156 and 172 themselves have no matrix here.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

MOST = 1024
"""Largest order that is made; a width needs as many products a channel."""


def order_of(columns: int) -> int | None:
    """The smallest K that is 1 or an order above, with ``columns`` = K 2^m; None where there is none up to MOST."""
    odd = columns // (columns & -columns)
    if odd == 1:
        return 1
    order = 4 * odd
    while columns % order == 0 and order <= MOST:
        if _family(order) is not None:
            return order
        order *= 2
    return None


@lru_cache(maxsize=8)
def paley(order: int) -> Tensor:
    """The matrix of an ``order`` that :func:`order_of` gives, float64 (order, order)."""
    with torch.inference_mode(False):  # may later be used where gradients are taken
        family = _family(order)
        if family is None:
            return torch.ones(1, 1, dtype=torch.float64)
        prime, power = family
        size = prime**power
        core = torch.ones(size + 1, size + 1, dtype=torch.float64)
        core[0, 0], core[1:, 1:] = 0, _differences(prime, power)
        if size % 4 == 3:
            core[1:, 0] = -1
            return torch.eye(size + 1, dtype=torch.float64) + core
        even, odd = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        whole = torch.kron(core, even) + torch.kron(torch.eye(size + 1, dtype=torch.float64), odd)
        return whole * whole[0]


def _family(order: int) -> tuple[int, int] | None:
    """Prime and exponent of the q that an ``order`` comes from, or None."""
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and size > 2 and size % 4 == remainder:
            prime = next(d for d in range(2, size + 1) if size % d == 0)
            power = next(k for k in itertools.count(1) if prime**k >= size)
            if prime**power == size:
                return prime, power
    return None


def _differences(prime: int, power: int) -> Tensor:
    """chi(a - b) over the elements in the order of their digits: (q, q), zeros on the diagonal."""
    size, places = prime**power, [prime**k for k in range(power)]
    character = torch.zeros(size, dtype=torch.float64)
    for exponent, element in enumerate(_powers(prime, power)):
        character[sum(digit * place for digit, place in zip(element, places, strict=True))] = 1 - 2 * (exponent % 2)
    digits = torch.arange(size).unsqueeze(1) // torch.tensor(places) % prime
    apart = (digits.unsqueeze(1) - digits) % prime
    return character[(apart * torch.tensor(places)).sum(-1)]


def _powers(prime: int, power: int) -> list[tuple[int, ...]]:
    """1, x, x^2, ... of an x of which every element but zero is a power, as digits to the base ``prime``.

    Elements are polynomials in x; a rule says what x^power is. Where the powers of x run through all q - 1 elements
    but zero, all of those have inverses, so the rule has made a field; its squares are the even powers.
    """
    one = (1, *[0] * (power - 1))
    for rule in itertools.product(range(prime), repeat=power):
        found, element = list[tuple[int, ...]](), one
        while len(found) < prime**power - 1 and (not found or element != one):
            found.append(element)
            shifted = (0, *element[:-1])
            element = tuple((low + element[-1] * r) % prime for low, r in zip(shifted, rule, strict=True))
        if len(found) == prime**power - 1 and element == one:
            return found
    raise AssertionError("every finite field has such an element")
