# SPDX-License-Identifier: Apache-2.0
"""Methods of about one bit from their definitions, in float64 and one entry at a time: slow, and not of the code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def ptq161(weight: Array, largest: Array, share: float, bits: int) -> Array:
    """PTQ1.61 before anything is learned: the columns of the largest inputs rounded to nearest, ``mu +- alpha`` for the
    others (Zhao et al. 2025, arXiv:2502.13179), with alpha = mean |w - mu|."""
    rows, columns = weight.shape
    salient = sorted(range(columns), key=lambda i: (-largest[i], i))[: round(share * columns)]
    result = np.zeros_like(weight)
    for o in range(rows):
        kept = [weight[o, i] for i in salient]
        low, high = (min(kept), max(kept)) if kept else (0.0, 0.0)
        step = (high - low) / (2**bits - 1)
        others = [i for i in range(columns) if i not in salient]
        mean = sum(weight[o, i] for i in others) / len(others)
        alpha = sum(abs(weight[o, i] - mean) for i in others) / len(others)
        for i in range(columns):
            if i in salient:
                result[o, i] = low + step * round((weight[o, i] - low) / step)
            else:
                result[o, i] = mean + alpha * (1 if weight[o, i] > mean else -1)
    return result


def residual(row: Array) -> tuple[float, float]:
    """Scales of two binarizations, the second of what the first leaves."""
    first = sum(abs(w) for w in row) / len(row)
    left = [w - first * (1 if w > 0 else -1) for w in row]
    return first, sum(abs(w) for w in left) / len(row)


def split(row: Array, points: int) -> tuple[float, float]:
    """Scales of the concentrated and the sparse group, at the threshold that loses least; (sparse, concentrated)."""
    mean = sum(abs(w) for w in row) / len(row)
    best, least = (mean, mean), np.inf
    for point in range(1, points + 1):
        edge = max(abs(w) for w in row) * point / (points + 1)
        small = [abs(w) for w in row if abs(w) <= edge]
        large = [abs(w) for w in row if abs(w) > edge]
        if not small or not large:
            continue
        a, b = np.mean(small), np.mean(large)
        lost = sum((w - a) ** 2 for w in small) + sum((w - b) ** 2 for w in large)
        if lost < least:
            best, least = (float(b), float(a)), lost
    return best


def billm(weight: Array, moment: Array, width: int, salient: int, damping: float, points: int) -> Array:
    """BiLLM in whole blocks of ``width`` columns, the first ``salient`` ones by residuals, with error feedback as the
    paper of GPTQ has it: by rows of the upper Cholesky factor of the inverse of the second moment."""
    columns = weight.shape[1]
    damped = moment + damping * np.mean(np.diag(moment)) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    worth = [sum(w * w for w in weight[:, i]) / upper[i, i] ** 2 for i in range(columns)]
    order = sorted(range(columns), key=lambda i: -worth[i])
    order = sorted(order[: salient * width]) + sorted(order[salient * width :])
    now = weight[:, order].copy()
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    result = np.zeros_like(weight)
    for begin in range(0, columns, width):
        block = range(begin, min(begin + width, columns))
        levels = []
        for row in now[:, begin : begin + width]:
            if begin // width < salient:
                a, b = residual(row)
                levels.append([a + b, a - b])
            else:
                levels.append(list(split(row, points)))
        levels = [[sign * level for level in row for sign in (1, -1)] for row in levels]
        for k in block:
            for o, values in enumerate(levels):
                chosen = min(values, key=lambda v, w=now[o, k]: abs(w - v))  # type: ignore[misc]
                result[o, order[k]] = chosen
                now[o, k + 1 :] -= (now[o, k] - chosen) / upper[k, k] * upper[k, k + 1 :]
    return result


def svid(matrix: Array, power: int) -> Array:
    """``sign(X) a b^T``, a b^T after ``power`` power steps from the mean of the rows of |X|."""
    b = np.abs(matrix).mean(0)
    for _ in range(power):
        b = np.abs(matrix).T @ (np.abs(matrix) @ b)
        b = b / np.linalg.norm(b)
    return np.where(matrix > 0, 1.0, -1.0) * np.outer(np.abs(matrix) @ b, b)


def admm(
    target: Array, rank: int, iterations: int, penalty: Callable[[int], float], regular: float, power: int
) -> Array:
    """What Z_U Z_V^T is after ADMM for ``target = U V^T``, U and V of signs under rank-one scales."""
    left, values, right = np.linalg.svd(target, full_matrices=False)
    u, v = left[:, :rank] * np.sqrt(values[:rank]), right[:rank].T * np.sqrt(values[:rank])
    zu, zv, lu, lv = svid(u, power), svid(v, power), 0 * u, 0 * v
    for step in range(iterations):
        unit = np.trace(v.T @ v) / rank
        inverse = np.linalg.inv(v.T @ v + (penalty(step) + regular) * unit * np.eye(rank))
        u = (target @ v + penalty(step) * unit * (zu - lu)) @ inverse
        zu = svid(u + lu, power)
        lu = lu + u - zu
        unit = np.trace(u.T @ u) / rank
        inverse = np.linalg.inv(u.T @ u + (penalty(step) + regular) * unit * np.eye(rank))
        v = (target.T @ u + penalty(step) * unit * (zv - lv)) @ inverse
        zv = svid(v + lv, power)
        lv = lv + v - zv
    return zu @ zv.T
