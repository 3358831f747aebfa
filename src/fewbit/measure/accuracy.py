# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a causal language model, from logits: perplexity, KL to a reference, top-1 agreement, and their errors.

Tokens of one window are far from independent, so every standard error is clustered by window (Liang and Zeger 1986):
with window sums ``S_w`` over ``n_w`` tokens and the mean ``m = sum S_w / sum n_w``,

    se(m)^2 = W / (W - 1) * sum_w (S_w - m n_w)^2 / (sum_w n_w)^2

The per-token formula assumes independence and is used only when there is one window; ``stderr_kind`` says which it was.
The error of a perplexity ``exp(m)`` is ``exp(m) se(m)`` (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbit.errors import VerificationError

CHUNK_BYTES = 64 * 2**20
"""Float32 bytes of one log-softmax over (tokens, vocabulary); it bounds the working memory beside the logits."""
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """The scored tokens of one window, each float64 (tokens,).

    ``nll``: -log q(next token) in nats. ``reference_nll``, ``kl`` = KL(reference || model) over the whole vocabulary
    and ``agree`` (1 where both rank the same token first) are None when there was no reference.
    """

    nll: Floats
    reference_nll: Floats | None = None
    kl: Floats | None = None
    agree: Floats | None = None


def score(logits: Tensor, ids: Tensor, reference: Tensor | None = None, unscored: int = 1) -> Scores:
    """Score one window.

    Args:
        logits: (tokens, vocabulary) of the model; row ``t`` predicts ``ids[t + 1]``.
        ids: (tokens,) the window itself.
        reference: (tokens, vocabulary) of the reference on the same window.
        unscored: leading tokens of the window that are not scored; at least 1, as nothing predicts the first.

    Raises:
        VerificationError: NaN in the logits.
    """
    rows, targets = slice(unscored - 1, len(ids) - 1), ids[unscored:]
    model = logits[rows]
    other = None if reference is None else reference[rows]
    step = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    parts = [
        _score_chunk(model[at : at + step], targets[at : at + step], None if other is None else other[at : at + step])
        for at in range(0, len(targets), step)
    ]
    return Scores(*(None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


def _score_chunk(
    logits: Tensor, targets: Tensor, reference: Tensor | None
) -> tuple[Floats, Floats | None, Floats | None, Floats | None]:
    log_q = _log_softmax(logits, "the model")
    nll = -log_q.gather(1, targets.unsqueeze(1)).squeeze(1)
    if reference is None:
        return _array(nll), None, None, None
    log_p = _log_softmax(reference, "the reference")
    reference_nll = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    p = log_p.exp()
    # A token that the reference rules out adds nothing, even where both logarithms are -inf. Rounding can leave a KL
    # of about -1e-7, which the definition does not allow.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1, dtype=torch.float64).clamp_min(0)
    agree = logits.argmax(1) == reference.argmax(1)
    return _array(nll), _array(reference_nll), _array(kl), _array(agree)


def _log_softmax(logits: Tensor, whose: str) -> Tensor:
    result = torch.log_softmax(logits.float(), dim=-1)
    if bool(torch.isnan(result).any()):
        raise VerificationError(
            f"log-probabilities of {whose}", "its logits contain NaN", "check the weights; quantize again"
        )
    return result


def _array(values: Tensor) -> Floats:
    result: Floats = values.to("cpu", torch.float64).numpy()
    return result


def mean_and_error(windows: Sequence[Floats]) -> tuple[float, float]:
    """Mean over all tokens and its standard error, clustered by window (per token when there is one window)."""
    values = np.concatenate(windows)
    mean = float(values.mean())
    if not math.isfinite(mean):
        return mean, mean
    if len(windows) == 1:
        return mean, float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    excess = np.array([window.sum() - mean * len(window) for window in windows])
    number = len(windows)
    return mean, float(math.sqrt(number / (number - 1) * (excess**2).sum()) / len(values))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def perplexity(nll: Sequence[Floats]) -> tuple[float, float]:
    """``exp`` of the mean negative log-likelihood, and its standard error."""
    mean, error = mean_and_error(nll)
    return _exp(mean), _exp(mean) * error


def summarize(windows: Sequence[Scores]) -> dict[str, Any]:
    """Figures of the model over all windows: ``perplexity``, ``perplexity_stderr`` and, with a reference, the rest.

    ``perplexity_ratio`` is model over reference on the same tokens: its error is paired, so far smaller than that of
    either perplexity.
    """
    value, error = perplexity([w.nll for w in windows])
    figures: dict[str, Any] = {"perplexity": value, "perplexity_stderr": error}
    kl = [w.kl for w in windows if w.kl is not None]
    if not kl:
        return figures
    agree = [w.agree for w in windows if w.agree is not None]
    change = [w.nll - w.reference_nll for w in windows if w.reference_nll is not None]
    ratio, ratio_error = perplexity(change)
    mean, mean_error = mean_and_error(kl)
    same, same_error = mean_and_error(agree)
    every = np.concatenate(kl)
    return figures | {
        "kl_mean": mean,
        "kl_mean_stderr": mean_error,
        "kl_p999": float(np.quantile(every, 0.999)),
        "kl_quantiles": {str(q): float(np.quantile(every, q)) for q in QUANTILES},
        "top1_agreement": same,
        "top1_agreement_stderr": same_error,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": ratio_error,
    }


def summarize_reference(windows: Sequence[Scores]) -> dict[str, Any]:
    """The same keys for the reference, whose divergence from itself is zero by definition."""
    value, error = perplexity([w.reference_nll for w in windows if w.reference_nll is not None])
    return {
        "perplexity": value,
        "perplexity_stderr": error,
        "kl_mean": 0.0,
        "kl_mean_stderr": 0.0,
        "kl_p999": 0.0,
        "kl_quantiles": {str(q): 0.0 for q in QUANTILES},
        "top1_agreement": 1.0,
        "top1_agreement_stderr": 0.0,
        "perplexity_ratio": 1.0,
        "perplexity_ratio_stderr": 0.0,
    }
