# SPDX-License-Identifier: Apache-2.0
"""What a layer's quantization costs at its output: ``E |(W - W_hat) x|^2 = tr(D G D^T)`` with ``G = E[x x^T]``.

The objective that GPTQ minimises (Frantar et al. 2022, arXiv:2210.17323), summed over rows; with the diagonal of G
alone it is the one that the clipping search minimises, and with the identity it is the squared error of the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewbit.core import given
from fewbit.core.facts import Facts, half
from fewbit.core.format import Format
from fewbit.core.qtensor import QTensor
from fewbit.core.sums import all_finite
from fewbit.errors import InputError, UnsupportedError

TILE = 256
"""Columns whose part of the second moment is multiplied whole."""


def row_errors(error: Tensor, facts: Facts | None) -> Tensor:
    """``d G d^T`` of every row d of ``error`` (rows, columns): float64 (rows,).

    G is the second moment if ``facts`` have it, else its diagonal E[x^2], else (no facts, no token) the identity.
    Products are taken in float32, and a sum that rounding left below zero is zero.
    """
    error = error.float()
    if facts is None or not facts.tokens:
        found = _products(error, error)
    elif facts.gram is None:
        found = _products(error * facts.mean_square, error)
    else:
        found = _quadratic(error, facts.gram) / facts.tokens
    return found.clamp_min(0)


def _quadratic(error: Tensor, gram: Tensor) -> Tensor:
    """``d G d^T`` with the symmetric ``gram``, of which only what lies above square tiles is multiplied, and they."""
    if len(gram) <= TILE:
        return _products(error @ gram, error)
    middle = half(len(gram))
    (first, last), (above, below) = error.tensor_split([middle], 1), gram.tensor_split([middle])
    across = _products(first @ above[:, middle:], last)
    return _quadratic(first, above[:, :middle]) + 2 * across + _quadratic(last, below[:, middle:])


def _products(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1, dtype=torch.float64)


def relative_error(weight: Tensor, quantized: QTensor | Tensor, facts: Facts | None = None) -> float:
    """``sqrt(tr(D G D^T) / tr(W G W^T))``: root mean square error of the layer's output relative to the output.

    Args:
        weight: (rows, columns).
        quantized: what stands for it, or its dequantized values (rows, columns).
        facts: of the layer's inputs; see :func:`row_errors` for what they may lack.

    Returns:
        0 when nothing is lost, 1 when the output is lost as a whole; infinite when a zero weight became non-zero.
    """
    values = quantized.dequantize() if isinstance(quantized, QTensor) else quantized
    lost = float(row_errors(weight.float() - values.float(), facts).sum())
    whole = float(row_errors(weight, facts).sum())
    if lost == 0:
        return 0.0
    return math.sqrt(lost / whole) if whole else math.inf


def check(method: str, weight: Tensor, format: Format, facts: Facts | None = None) -> None:
    """Refuse what no method can quantize, before any work.

    Raises:
        InputError: the weight is no matrix, is empty, holds NaN or infinity, or the facts are of another width or not
            finite.
    """
    check_matrix(method, weight, format)
    check_finite(method, weight, format)
    if facts is None:
        return
    if facts.columns != weight.shape[1]:
        found, works = f"the facts are of {facts.columns} inputs", "pass the facts of this layer's inputs"
    elif not all_finite(facts.total_square if facts.gram is None else facts.gram):
        found = "the layer's calibration inputs hold NaN or infinity, or their squares do"
        works = "check that the model runs in float on the calibration text"
    else:
        return
    raise InputError(asked(method, weight, format), found, works)


def check_matrix(method: str, weight: Tensor, format: Format) -> None:
    """Raises InputError: the weight is no matrix, or empty. SpecError: it is no tensor, or ``format`` no format."""
    given.kind(f"the weight for {method}", weight, Tensor, "a tensor (rows, columns)")
    given.kind(f"the format for {method}", format, Format, "what fewbit.formats.parse('int4/g64') gives")
    if weight.dim() != 2 or weight.numel() == 0:
        found = "it is not a matrix with at least one entry"
        raise InputError(asked(method, weight, format), found, "see the weight as (rows, columns)")


def check_finite(method: str, weight: Tensor, format: Format) -> None:
    """Raises InputError: the weight holds NaN or infinity."""
    if not all_finite(weight):
        bad = ~weight.isfinite()
        row, column = (int(i) for i in bad.nonzero()[0])
        found = f"{int(bad.sum())} entries are NaN or infinite, first weight[{row}, {column}]"
        raise InputError(asked(method, weight, format), found, "repair the checkpoint, or leave this layer in float")


def check_moment(method: str, weight: Tensor, format: Format, facts: Facts, instead: str = "") -> None:
    """Raises InputError: tokens were seen, and not their second moment; ``instead``: a method that needs none."""
    if facts.tokens and facts.gram is None:
        works = "collect them with gram=True" + (f", or use method {instead}" if instead else "")
        raise InputError(asked(method, weight, format), "the facts hold no second moment", works)


def asked(method: str, weight: Tensor, format: Format) -> str:
    """What was asked, for an error."""
    return f"{method} of a weight of shape {tuple(weight.shape)} to {format.name}"


def refuse_vectors(format: Format) -> str | None:
    """None, or why a method that rounds one weight at a time cannot choose codes of ``format``."""
    weights = format.dim * format.height
    return None if weights == 1 else f"one code stands for {weights} weights"


def check_scalar(method: str, format: Format) -> None:
    """Refuse formats whose codes stand for several weights.

    Raises:
        UnsupportedError: they do.
    """
    reason = refuse_vectors(format)
    if reason is not None:
        raise UnsupportedError(f"{method} to {format.name}", reason, "methods rtn and vptq take such formats")
