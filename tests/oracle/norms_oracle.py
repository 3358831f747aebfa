# SPDX-License-Identifier: Apache-2.0
"""Scales of rows and columns as they are defined, in float64 numpy: their sizes, and the best of them under codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sizes(weight: Array, axis: int) -> Array:
    """Root mean squares along ``axis``, 1 for zeros."""
    found = np.sqrt((weight**2).mean(axis))
    return np.where(found > 0, found, 1.0)


def best_rows(weight: Array, shown: Array, moment: Array) -> Array:
    """(rows,): the factors of the rows of ``shown`` of least ``tr(E G E^T)``, by a least squares solve each."""
    root = np.linalg.cholesky(moment)
    pairs = zip(weight @ root, shown @ root, strict=True)
    return np.array([np.linalg.lstsq(now[:, None], wanted, rcond=None)[0][0] for wanted, now in pairs])


def best_columns(weight: Array, shown: Array, moment: Array) -> Array:
    """(columns,): the factors of the columns, by one dense solve over all entries."""
    root = np.linalg.cholesky(moment)
    tall = np.concatenate([root.T @ np.diag(row) for row in shown])
    wanted = np.concatenate([root.T @ row for row in weight])
    found: Array = np.linalg.lstsq(tall, wanted, rcond=None)[0]
    return found
